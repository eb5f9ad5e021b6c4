"""What importing lorakit costs, and that its files import downward only, without a cycle."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
from pathlib import Path

import pytest

import lorakit
from lorakit import _lazy

ROOT = Path(lorakit.__file__).parent

# Each package may import from those before it, and from itself.
LAYERS = [
    {"_version", "errors", "_checks", "_lazy", "_report", "_figures", "_files", "_format", "_records", "_signals"},
    {"_distributed", "spectral", "naming", "allocation", "statistics"},
    {"_registration"},
    {"tuners", "adapters"},
    {"data", "calibration"},
    {"evaluation"},
    {"fisher", "surgery", "compress", "merging", "export", "serving"},
    {"lens", "cost"},
    {"experiments", "fleet"},
    {"demo"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The packages that may be imported inside a function, and why: none of them loads at `import lorakit`, and only those
# marked "audit" at `lorakit audit`.
DEFERRED = {
    "PIL": "needed only for images",
    "accelerate": "heavy: imports torch and transformers' stack",
    "datasets": "heavy: imports pyarrow",
    "gguf": "optional extra",
    "huggingface_hub": "heavy: needed only for Hub ids",
    "lm_eval": "optional extra",
    "matplotlib": "heavy: needed only for figures",
    "pandas": "optional: needed only for to_frame",
    "peft": "heavy: not needed for adapters on disk",
    "ray": "optional extra",
    "rich": "heavy: needed only for tables on a terminal",
    "scipy": "heavy: needed only for statistics",
    "statsmodels": "optional extra",
    "torch": "heavy: not needed for --help",
    "torch.distributed.fsdp": "heavy: needed only among several processes",
    "torch.distributed.tensor": "heavy: needed only among several processes",
    "transformers": "heavy: not needed for adapters on disk",
    "trl": "optional extra",
    "typer": "heavy: needed only for the command line",
}


# Imports inside functions that defer nothing heavy: (file, what it imports) → why.
EXEMPT = dict.fromkeys(
    [
        ("lorakit.tuners.fisherlora", "lorakit.allocation.probed"),
        ("lorakit.tuners.speclora", "lorakit.allocation.probed"),
    ],
    "threads that import both tuners at once would wait for each other",
)


def _name_of(path: Path) -> str:
    parts = ("lorakit", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def _imports(module: str) -> list[tuple[str, ast.AST | None, int]]:
    """What a file imports, as (absolute name, the function it stands in, line), TYPE_CHECKING blocks included."""
    tree = ast.parse(FILES[module].read_text())
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []

    def visit(node: ast.AST, function: ast.AST | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, function, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    source = ".".join([*above, *([source] if source else [])])
                public = _lazy.exports(source) if source in _lazy._FILES else {}
                for alias in child.names:
                    inner = f"{source}.{alias.name}"
                    found.append((inner if inner in FILES else public.get(alias.name, source), function, child.lineno))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, child if inside else function)

    visit(tree, None)
    return found


IMPORTS = {module: _imports(module) for module in FILES}
GRAPH = {module: {name for name, _, _ in found if name in FILES} - {module} for module, found in IMPORTS.items()}


def _loaded_by(module: str) -> set[str]:
    """The third-party packages that importing a file loads, through its imports outside of functions."""
    loaded: set[str] = set()
    todo, seen = [module], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        typing_only = _typing_only(current)
        for name, function, line in IMPORTS[current]:
            if function is not None or line in typing_only:
                continue
            if name in FILES:
                todo.append(name)
            else:
                loaded |= _prefixes(name)
    return loaded


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _typing_only(module: str) -> set[int]:
    tree = ast.parse(FILES[module].read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {
        node.lineno
        for block in blocks
        for statement in block.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward(module):
    own = [*module.split("."), "__init__"][1]
    assert own in LEVEL, f"{module} has no place in LAYERS"
    for name, _, line in IMPORTS[module]:
        if name.partition(".")[0] != "lorakit" or name == "lorakit":
            continue
        other = name.split(".")[1]
        assert LEVEL[other] <= LEVEL[own], f"{module}, line {line} imports {name}, which lies above it"


def test_no_two_packages_of_one_level_import_each_other():
    packages: dict[str, set[str]] = {}
    for module, names in GRAPH.items():
        own = module.split(".")[1:2]
        for name in names:
            if own and name.split(".")[1:2] not in ([], own):
                packages.setdefault(own[0], set()).add(name.split(".")[1])
    list(graphlib.TopologicalSorter(packages).static_order())  # raises CycleError, which names the cycle


def test_no_two_files_import_each_other():
    """Counting imports for type checkers, those inside functions and relative ones."""
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the cycle


@pytest.mark.slow
@pytest.mark.parametrize("module", FILES)
def test_imports_inside_functions_have_a_reason(module):
    """A heavy or optional package, or a file of lorakit's that imports one, which this file does not load anyway."""
    loaded = _loaded_by(module)
    for name, function, line in IMPORTS[module]:
        if function is None or any(owner == module and name.startswith(what) for owner, what in EXEMPT):
            continue
        packages = _loaded_by(name) if name in FILES else _prefixes(name)
        deferred = (packages & set(DEFERRED)) - loaded
        assert deferred, f"{module}, line {line}: {name} defers nothing; import it at the top of the file"


@pytest.mark.slow
def test_importing_lorakit_imports_nothing_heavy(run_python):
    code = f"import sys, lorakit; print(sorted({{n.partition('.')[0] for n in sys.modules}} & set({sorted(DEFERRED)})))"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("package", _lazy._FILES)
def test_the_table_of_exports_is_what_type_checkers_see(package):
    path = FILES[package]
    blocks = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.If)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in FILES else node.module
        for node in blocks[0].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == _lazy.exports(package)


PUBLIC = [(package, name) for package in _lazy._FILES for name in _lazy.exports(package)]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[f"{package}.{name}" for package, name in PUBLIC])
def test_every_public_name_is_there_and_documented(package, name):
    module = importlib.import_module(package)
    value = getattr(module, name)
    assert name in dir(module)
    assert name in module.__all__
    documented = inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)
    assert value.__doc__ or not documented


@pytest.mark.parametrize("package", ["lorakit.lens", "lorakit.adapters"])
def test_importing_a_package_imports_neither_transformers_nor_peft(run_python, package):
    code = f"""
        import sys
        import {package}
        print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"transformers", "peft", "matplotlib"}}))
    """
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("package", _lazy._FILES)
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = importlib.import_module(package).nothing
