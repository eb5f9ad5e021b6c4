"""The README's pictures and the demo's output in it, from what `make demo` leaves.

    python benchmarks/readme_pictures.py demo-output .

1. How the demo's LoRA uses its rank: capacity utilization by layer and projection, from `lorakit.lens.audit`.
2. What a smaller rank costs: the adapter compressed to several shares of its energy, and each one's held-out loss less
   the original's, document by document, with one-sided 95 % bounds.
3. What `lorakit demo` prints, into README.md, and its results, into docs/images/demo.json.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import lorakit
from lorakit._figures import new_figure
from lorakit.demo import DemoReport
from lorakit.evaluation import compare, evaluate_adapters, loss
from lorakit.lens.render.table import print_report

ENERGIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
OUTPUT = re.compile(r"(?<=## The demo's output\n\n).*?\n```\n(?=\n)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo_output", type=Path)
    parser.add_argument("repository", type=Path)
    arguments = parser.parse_args()
    images = arguments.repository / "docs" / "images"
    readme = arguments.repository / "README.md"
    shutil.copyfile(arguments.demo_output / "results.json", images / "demo.json")
    readme.write_text(with_output(readme.read_text(), printed(DemoReport.read(images / "demo.json"))))
    draw_utilization(arguments.demo_output / "lora").savefig(images / "utilization.png", dpi=120)
    rows, parameters = measure(arguments.demo_output)
    for row in rows:
        print("{energy:.2f} {parameters:>9,} {mean:+.4f} ± {reach:.4f}".format(**row))
    draw_compression(rows, parameters).savefig(images / "compression.png", dpi=120)


def printed(report: DemoReport) -> str:
    """What the command prints, 80 columns wide."""
    console = Console(width=80, file=io.StringIO())
    print_report(report, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def with_output(readme: str, output: str) -> str:
    """The README with the demo's output replaced."""
    block = f"`make demo` on 2 cores, as printed:\n\n```text\n{output}\n```\n"
    changed, found = OUTPUT.subn(lambda match: block, readme)
    if found != 1:
        raise SystemExit('README.md has no block of text below the heading "The demo\'s output".')
    return changed


def draw_utilization(adapter: Path) -> Any:
    report = lorakit.lens.audit(adapter)
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for role in dict.fromkeys(module.role for module in report.modules):
        rows = sorted((row for row in report.modules if row.role == role), key=lambda row: row.layer or 0)
        axes.plot([row.layer for row in rows], [row.capacity_utilization for row in rows], ".-", label=role)
    axes.set(xlabel="layer", ylabel="capacity utilization", ylim=(0, 1))
    axes.set_title("How much of its rank 16 the demo's LoRA uses")
    axes.legend(ncols=4, loc="lower center")
    return figure


def measure(demo: Path) -> tuple[list[dict[str, float]], int]:
    """For each share of the energy: parameters, and the paired difference of the held-out loss with its reach."""
    lora, task = str(demo / "lora"), loss(demo / "held-out.jsonl", batch_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        cut = {e: lorakit.compress.truncate(lora, Path(scratch, f"{e}"), energy=e) for e in ENERGIES}
        scores = evaluate_adapters(demo / "base", [lora, *(report.path for report in cut.values())], task)
    rows = []
    for energy, report in cut.items():
        interval = compare(scores[lora][task.name], scores[report.path][task.name])
        reach = (interval.upper - interval.lower) / 2
        rows.append({"energy": energy, "parameters": report.parameters, "mean": -interval.difference, "reach": reach})
    return rows, cut[ENERGIES[0]].parameters_before


def draw_compression(rows: list[dict[str, float]], parameters: int) -> Any:
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    shares = [row["parameters"] / parameters for row in rows]
    axes.errorbar(shares, [row["mean"] for row in rows], yerr=[row["reach"] for row in rows], fmt="o-", capsize=3)
    for share, row in zip(shares, rows, strict=True):
        axes.annotate(f"{row['energy']:.0%}", (share, row["mean"]), xytext=(4, 6), textcoords="offset points")
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(
        xlim=(0, 1.08),
        xlabel="parameters, as a share of the original's",
        ylabel="held-out loss less the original's\n(nats a token)",
    )
    axes.set_title("The demo's LoRA, cut to keep a share of each update's energy")
    return figure


if __name__ == "__main__":
    main()
