"""The demo's table and findings, from rows with known figures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorakit.demo import DemoReport, DemoRow, DemoSettings
from lorakit.demo._report import findings_of
from lorakit.lens.render.table import print_report

ALONE = DemoRow("no adapter", None, 0, 3.2391, 0.3789, 0.31, 0.4478, "FAIL", 4)
REFERENCE = DemoRow("LoRA", "lora", 2488320, 2.8602, file_rank=16, file_error=0.0, training_loss=(3.0, 2.5))
FILES = [
    DemoRow("LoRA, seed+1", "lora-other-seed", 2488320, 2.8608, 0.0006, -0.0013, 0.0025, "PASS", 1, 16, 3e-7),
    DemoRow("LoRA, compressed", "lora-compressed", 1866240, 2.9202, 0.06, 0.02, 0.1, "INCONCLUSIVE", 20, 12),
    DemoRow("SpecLoRA", "speclora-as-lora", 2511360, 2.8598, -0.0004, -0.0009, 0.0001, "PASS", 1, 216, 2e-6),
]


def report(**changes):
    fields = {
        "lorakit": "0.1.0",
        "settings": DemoSettings(),
        "base": "demo-output/base",
        "threads": 1,
        "seconds": 222.0,
        "documents": {"train": 96, "calibration": 22, "held_out": 14},
        "recommended_rank": 12,
        "size_bytes": (9953280, 7464960),
        "energy_kept": 0.953,
        "methods": (ALONE, REFERENCE, *FILES),
        "findings": (),
    }
    return DemoReport(**fields | changes)


def test_the_table_fits_80_columns():
    console = Console(width=80, file=io.StringIO())
    print_report(report(), console)
    lines = console.file.getvalue().splitlines()
    cells = {
        "no adapter": ("0", "3.2391", "+0.3789 ±.0689", "FAIL"),
        "LoRA ": ("2.49M", "2.8602", "reference", "16", "0e+00"),
        "LoRA, seed+1": ("2.8608", "+0.0006 ±.0019", "PASS", "3e-07"),
        "LoRA, compressed": ("1.87M", "+0.0600 ±.0400", "INCONCLUSIVE", "12"),
        "SpecLoRA": ("2.51M", "-0.0004 ±.0005", "PASS", "216", "2e-06"),
    }
    for method, pieces in cells.items():
        line = next(line for line in lines if line.startswith(method))
        assert [piece for piece in pieces if piece not in line] == []
    assert "…" not in "".join(lines)
    assert max(map(len, lines[: lines.index("next steps")])) <= 80


def test_the_headline_counts_verdicts_of_files_alone():
    assert report().headline == (
        "2 PASS, 1 INCONCLUSIVE against the LoRA, on 14 held-out documents, at a margin of 0.05 nats a token."
    )
    assert "Another seed changes the LoRA's loss by +0.0006." in report().details
    assert "The audit recommends rank 12 of 16: 9.95 MB → 7.46 MB, 95.3% of the energy kept." in report().details
    assert report().details[-2].endswith("none in two parts; 1 thread, 3.7 minutes.")


def test_names_in_commands_are_quoted():
    steps = report(settings=DemoSettings(out="my demo"), base="my base").next_steps
    assert "--base 'my base' 'my demo/lora' 'my demo/lora-compressed' --task 'my demo/held-out.jsonl'" in steps[2]


@pytest.mark.parametrize(("error", "found"), [(None, 0), (9e-5, 0), (2e-4, 1), (float("nan"), 1)])
def test_a_file_that_differs_is_an_error(error, found):
    [row] = [DemoRow("SpecLoRA", "speclora-as-lora", 1, 2.0, file_error=error)]
    findings = findings_of([row])
    assert len(findings) == found
    if findings:
        assert findings[0].severity == "error"
        assert "the logits of speclora-as-lora differ" in findings[0].message
        assert report(findings=findings).has_errors


def test_the_figures_have_the_margin_and_every_file():
    [axes] = report().plot().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{row.method}: {row.verdict}" for row in FILES]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "margin"] == [0.05]
    assert list(report().figures()) == ["verdicts", "training"]
