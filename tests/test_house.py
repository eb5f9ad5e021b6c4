"""The house's limits: files that one can read in one sitting, functions that fit a screen, few parameters."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import lorakit
from lorakit import _lazy

ROOT = Path(lorakit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PUBLIC = {name for package in _lazy._FILES for name in _lazy.exports(package)}
# The functions that most users call, whose docstrings have an example that runs.
MAIN = [
    "lorakit.lens.audit",
    "lorakit.lens.compare",
    "lorakit.compress.truncate",
    "lorakit.merging.merge",
    "lorakit.export.to_lora",
    "lorakit.surgery.reweight",
    "lorakit.fisher.probe",
    "lorakit.allocation.allocate",
    "lorakit.experiments.rank_sweep",
    "lorakit.cost.accounting",
    "lorakit.compress.smallest",
    "lorakit.evaluation.agreement",
    "lorakit.evaluation.certify",
    "lorakit.evaluation.evaluate",
]


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, those of its docstring not counted."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def _is_init(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "__init__"


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_are_short(path):
    assert path.read_text().count("\n") <= 400
    long = {function.name: _lines(function) for function in _functions(path) if _lines(function) > 60}
    assert not long
    public = path.parent.name == "cli" or path.name in ("compress.py", "merging.py", "export.py", "allocation.py")
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    made = {node.lineno for owner in classes if owner.name in PUBLIC for node in owner.body if _is_init(node)}
    for function in _functions(path):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        named = function.name in PUBLIC or function.lineno in made
        assert count <= 8 or named or (public and not function.name.startswith("_")), function.name


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_the_example_of_a_main_function_runs(name, tmp_path, monkeypatch):
    module, _, function = name.rpartition(".")
    value = getattr(importlib.import_module(module), function)
    monkeypatch.chdir(tmp_path)
    globals_ = vars(inspect.getmodule(value))
    [test] = doctest.DocTestFinder(recurse=False).find(value, name, globs=dict(globals_))
    assert test.examples, f"{name} has no example"
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0
