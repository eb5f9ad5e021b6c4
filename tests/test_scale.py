"""What commands do grows linearly with the modules, and memory holds a few modules at a time; nothing is timed."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from collections import Counter

import pytest
import torch
from rich.console import Console

from lorakit.adapters.read import SafetensorsFile
from lorakit.adapters.stream import SafetensorsWriter
from lorakit.compress import truncate
from lorakit.export import to_lora
from lorakit.lens import audit, compare
from lorakit.lens.render.html import to_html
from lorakit.lens.render.table import print_report
from lorakit.merging import merge
from lorakit.serving import check_all


@pytest.fixture
def adapter(write_adapter):
    """Writes an adapter of many modules, each with a rank and a scaling of its own, which the config gives by name."""

    def write(name, modules, width=4, rank=None):
        generator = torch.Generator().manual_seed(0)
        ranks = {f"layers.{i // 2}.{'qv'[i % 2]}_proj": rank or 1 + i % 3 for i in range(modules)}
        factors = {
            module: (torch.randn(width, r, generator=generator), torch.randn(r, width, generator=generator))
            for module, r in ranks.items()
        }
        alphas = {module: r * (2 + i / modules) for i, (module, r) in enumerate(ranks.items())}
        return write_adapter(name, factors, r=7, lora_alpha=7, alpha_pattern=alphas, target_modules=list(ranks))

    return write


def named(path, rank):
    return dict.fromkeys(json.loads((path / "adapter_config.json").read_text())["rank_pattern"], rank)


COMMANDS = {
    "audit": lambda a, b, out: audit(a, suggest_ranks=True),
    "table": lambda a, b, out: print_report(audit(a), Console(file=io.StringIO())),
    "compress": lambda a, b, out: truncate(a, out, energy=0.9),
    "compress per module": lambda a, b, out: truncate(a, out, energy=0.5, per_module=True),
    "compress by name": lambda a, b, out: truncate(a, out, ranks=named(a, 1), pad=False),
    "merge": lambda a, b, out: merge([a, b], out),
    "merge ties": lambda a, b, out: merge([a, b], out, method="ties", density=0.5, pad=False),
    "compare": lambda a, b, out: compare(a, b),
    "export": lambda a, b, out: to_lora(a, out, rank="auto"),
    "servers": lambda a, b, out: check_all(a),
}


def calls(function, *arguments):
    """The number of functions of Python and C that are called."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # its callbacks come at any time
    sys.setprofile(see)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_calls_and_opened_files_grow_linearly(name, adapter, tmp_path, monkeypatch):
    opened = Counter()
    open_file = SafetensorsFile._open

    def counted(self):
        opened["now"] += 1
        return open_file(self)

    monkeypatch.setattr(SafetensorsFile, "_open", counted)
    found, opens = [], []
    for modules in (0, 12, 24, 48):
        size = modules or 12  # the first run imports
        a, b = adapter(f"a{modules}", size), adapter(f"b{modules}", size)
        opened.clear()
        found.append(calls(COMMANDS[name], a, b, tmp_path / f"out{modules}"))
        opens.append(opened["now"])
    _, one, two, four = found
    assert four - two < 1.25 * 2 * (two - one)
    assert len(set(opens)) == 1  # not once a module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audit", "compare"])
def test_calls_grow_linearly_with_layers(name, adapter, tmp_path):
    found = []
    for modules in (2, 250, 500, 1000):  # the first run imports
        a, b = adapter(f"a{modules}", modules), adapter(f"b{modules}", modules)
        found.append(calls(COMMANDS[name], a, b, tmp_path / "out"))
    _, one, two, four = found
    assert four - two < 1.15 * 2 * (two - one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compress", "compress by name", "merge", "merge ties", "export"])
def test_memory_holds_a_few_modules_at_a_time(name, adapter, tmp_path, monkeypatch):
    width, rank, modules = 256, 128, 16  # more entries than a batch has, so that each module is one
    a, b = (adapter(label, modules, width, rank) for label in "ab")
    write = SafetensorsWriter.write
    sizes = []

    def alive():
        storages = {}
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor) and one.device.type == "cpu" and one.layout == torch.strided:
                with contextlib.suppress(RuntimeError):  # a fake tensor, that another test has left, holds no memory
                    storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return sum(storages.values())

    def watched(self, key, tensor):
        sizes.append(alive() - before)
        write(self, key, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", watched)
    before = alive()
    COMMANDS[name](a, b, tmp_path / "out")
    module = 4 * rank * 2 * width
    assert len(sizes) == 2 * modules
    assert max(sizes) < 10 * module  # of 16 or 32 modules: factors as read, merged, in float64, and padded


def test_the_html_of_many_modules_stays_small(adapter, monkeypatch):
    report = audit(adapter("a", 2100, width=2))
    monkeypatch.setattr(type(report), "figures", lambda self: {})
    page = to_html(report)
    assert "… and 100 more rows" in page
    assert "Modules (2100 rows)" in page
