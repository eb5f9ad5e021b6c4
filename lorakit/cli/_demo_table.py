"""The demo's table, and what its differences amount to."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lorakit.demo import LORA, OTHER_SEED


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print the table, and what of it is noise. It fits 80 columns."""
    settings = results["settings"]
    steps, size = f"{settings['steps']} steps", settings["batch_size"]
    table = Table(
        title=f"{results['model']}: {steps} of {size} × {settings['length']} tokens",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        show_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for heading in (
        "params",
        "before",
        "held-out loss\nafter",
        "against LoRA",
        "CU\nq",
        "CU\nv",
        " s /\nstep",
        "export",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(
            row["method"],
            f"{row['parameters'] / 1e6:.2f}M" if row["parameters"] >= 1e5 else str(row["parameters"]),
            _number(row["loss_before"], ".3f"),
            f"{row['loss_after']:.4f} ±{_small(row['loss_after_se'])}",
            "" if row["against_lora"] is None else f"{row['against_lora']:+.4f} ±{_small(row['against_lora_se'])}",
            _number(row["utilization_q"], ".2f"),
            _number(row["utilization_v"], ".2f"),
            _number(row["seconds_per_step"], ".2f"),
            "" if row["export_error"] is None else f"r{row['export_rank']}\n{row['export_error']:.0e}",
        )
    console.print(table)
    console.print(
        "Losses in nats a token ± one standard error over held-out sequences; 'against LoRA' is paired, sequence by "
        "sequence. CU: capacity utilization, effective rank over rank, of the query and value projections. export: "
        "largest rank of the plain LoRA written, and the largest difference of its logits, relative.",
        style="dim",
    )
    for line in verdicts(results["rows"]):
        console.print(f"• {line}")
    console.print(
        "One text and few steps: what is within noise here says nothing, and what is not says little. The demo shows "
        "that the methods work, not which is better.",
        style="dim",
    )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What each row's difference from LoRA amounts to.

    Noise is whatever is within two standard errors, or within the difference that another seed makes to LoRA itself.
    """
    seeds = next((abs(row["against_lora"]) for row in rows if row["method"] == OTHER_SEED), 0.0)
    lines = [f"Another seed changes LoRA's own held-out loss by {seeds:.4f}."] if seeds else []
    for row in rows:
        difference, se = row["against_lora"], row["against_lora_se"]
        if difference is None or row["method"] == OTHER_SEED:
            continue
        # Surgery edits one and the same trained adapter, so that seeds do not come between.
        noise = 2 * se if row["method"].startswith(f"{LORA}+") else max(2 * se, seeds)
        if abs(difference) <= noise:
            lines.append(f"{row['method']}: no difference from LoRA beyond noise ({difference:+.4f} ± {se:.4f}).")
        else:
            side = "lower" if difference < 0 else "higher"
            lines.append(f"{row['method']}: {side} than LoRA by {abs(difference):.4f} ± {se:.4f}, on this text.")
    return lines


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _small(value: float) -> str:
    return f"{value:.4f}".lstrip("0")
