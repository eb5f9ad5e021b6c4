"""The README's two pictures, from what `make demo` leaves.

    python benchmarks/readme_pictures.py demo-output docs/images

1. How the demo's LoRA uses its rank: capacity utilization by layer and projection, from `lorakit.lens.audit`.
2. What a smaller rank costs: the adapter compressed to several shares of its energy, and each one's held-out loss less
   the original's, paired by sequence.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit._figures import new_figure
from lorakit.demo import DemoSettings, held_out_losses, split_data

ENERGIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo_output", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences")
    arguments = parser.parse_args()
    arguments.images.mkdir(parents=True, exist_ok=True)
    draw_utilization(arguments.demo_output / "lora").savefig(arguments.images / "utilization.png", dpi=120)
    rows, parameters = measure(arguments.demo_output, arguments.sequences)
    for row in rows:
        print("{energy:.2f} {parameters:>9,} {mean:+.4f} ± {stderr:.4f}".format(**row))
    draw_compression(rows, parameters).savefig(arguments.images / "compression.png", dpi=120)


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


def measure(demo: Path, sequences: int) -> tuple[list[dict[str, float]], int]:
    """For each share of the energy: parameters, and the paired difference of the held-out loss with its error."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    data = split_data(tokenizer, DemoSettings(held_out_examples=sequences))["held_out"]
    batches = list(torch.split(data, 4))
    base = AutoModelForCausalLM.from_pretrained(demo / "base")
    model = PeftModel.from_pretrained(base, demo / "lora", adapter_name="whole")
    original = held_out_losses(model, batches)
    rows, parameters = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for energy in ENERGIES:
            out = Path(scratch) / f"{energy}"
            report = lorakit.compress.truncate(demo / "lora", out, energy=energy)
            parameters = report.parameters_before
            model.load_adapter(str(out), adapter_name="cut")
            model.set_adapter("cut")
            difference = held_out_losses(model, batches) - original
            model.delete_adapter("cut")
            stderr = float(difference.std() / len(difference) ** 0.5)
            rows.append(
                {
                    "energy": energy,
                    "parameters": report.parameters,
                    "mean": float(difference.mean()),
                    "stderr": stderr,
                }
            )
    return rows, parameters


def draw_compression(rows: list[dict[str, float]], parameters: int) -> Any:
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    shares = [row["parameters"] / parameters for row in rows]
    axes.errorbar(shares, [row["mean"] for row in rows], yerr=[row["stderr"] for row in rows], fmt="o-", capsize=3)
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
