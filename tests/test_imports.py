"""What importing lorakit costs, and that its modules import downward only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorakit

ROOT = Path(lorakit.__file__).parent

# Each may import from those before it, and from its own kind.
LAYERS = [
    {"_version", "errors", "_cross_entropy"},
    {"_distributed", "_plotting"},
    {"spectral", "allocation"},
    {"_registration"},
    {"tuners"},
    {"adapters"},
    {"calibration"},
    {"compress", "merging"},
    {"fisher", "surgery", "export", "serving"},
    {"lens"},
    {"demo", "probing"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Within surgery, from the bottom up.
SURGERY = ["_policies", "_reports", "_record", "_sensitivity", "_reweight", "__init__"]
# The registration makes `import peft` import the tuners, inside a function.
ALLOWED_UPWARD = {("_registration", "tuners")}


def _imports(path: Path) -> set[str]:
    """Dotted names of lorakit's modules that a file imports at run time, also inside functions."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("lorakit.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    own = path.relative_to(ROOT).with_suffix("").parts
    assert own[0] in LEVEL, f"{path} has no place in LAYERS"
    for name in _imports(path):
        other = name.split(".")[1:]
        if other[0] not in LEVEL or (own[0], other[0]) in ALLOWED_UPWARD:
            continue
        assert LEVEL[other[0]] <= LEVEL[own[0]], f"{'.'.join(own)} imports {name}, which lies above it"
        if own[0] == other[0] == "surgery" and len(other) > 1 and other[1] in SURGERY:
            assert SURGERY.index(other[1]) < SURGERY.index(own[1]), f"{'.'.join(own)} imports {name}"


def test_importing_lorakit_imports_neither_transformers_nor_peft(run_python):
    code = """
        import sys
        import lorakit
        loaded = {name.partition(".")[0] for name in sys.modules}
        print(sorted(loaded & {"transformers", "peft", "torch", "accelerate", "matplotlib", "typer", "rich"}))
    """
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(lorakit.__all__))
def test_every_public_name_is_there_and_documented(name):
    value = getattr(lorakit, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(lorakit)


@pytest.mark.parametrize("name", lorakit.lens.__all__)
def test_every_public_name_of_the_lens_is_there_and_documented(name):
    assert getattr(lorakit.lens, name).__doc__
    assert name in dir(lorakit.lens)


def test_importing_the_lens_imports_neither_transformers_nor_peft(run_python):
    code = """
        import sys
        import lorakit.lens
        print(sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "peft", "matplotlib"}))
    """
    assert run_python(code).stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lorakit.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lorakit.lens.nothing
