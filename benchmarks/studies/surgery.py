"""Study 3, Spectral Surgery: does reweighting a trained LoRA's singular values help? On trained LoRAs.

    python benchmarks/studies/surgery.py STAGE... --data DIR --out DIR

The adapters are the arm `all_linear` of the FisherLoRA study, one a seed. ARC-Easy is the aligned
task: its training questions calibrate, its test questions score; OpenBookQA and Python's documentation are the guards.
Stages: `centre` (all adapters: every policy, 20 draws of `random_index`, residual-writing modules, 128 examples, l1),
`accuracy` (the same edits of the first adapter, by accuracy), `sizes`, `modules`, `energies` (one factor at a time,
first adapter), `refine` (what `lorakit.surgery.refine` decides on each adapter). `study` keeps every score in
`--out`/surgery, so that each stage is resumable; reports are in `records/surgery`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tools
from fisherlora import Cell
from transformers import AutoTokenizer

from lorakit import evaluation, surgery
from lorakit.data import loader

STUDY = "surgery"
POLICIES = ("grad_direction", "smooth_abs", "abs_select", "double_smooth", "z_score", "robust_z")
SIZES = (32, 64, 128, 256)
CENTRE_SIZE, CENTRE_ENERGY = 128, "l1"
MODULE_SETS = {
    "residual": None,
    "attention inputs": r".*\.(q_proj|k_proj|v_proj)",
    "all": "all-linear",
}
ENERGIES = ("l1", "l2", "none")
CONTROLS = 20
MARGIN = 0.02  # nats: how much worse `refine` lets a guard be
OPTIONS = evaluation.LoadOptions(dtype=tools.DTYPE)


def adapter_of(out: Path, seed: int) -> Path:
    """A seed's LoRA of the arm `all_linear`, trained where it is missing."""
    cell = Cell(out, "all_linear", "all_linear")
    return cell.adapter(cell.rate(), seed)


def loss(out: Path, name: str) -> Any:
    """Held-out loss on one of the test sets."""
    file = out / ("documentation.jsonl" if name == "documentation" else f"{name}_loss.jsonl")
    return evaluation.loss(str(file), name=name, length=tools.LENGTH, batch_size=tools.BATCH_SIZE)


def calibration(out: Path, *files: str) -> Any:
    """The calibration examples, and after them those of further files."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    read = functools.partial(loader, tokenizer=tokenizer, length=tools.LENGTH, batch_size=1, progress=False)
    return [batch for name in files for batch in read(out / name)]


def run(out: Path, name: str, seed: int = tools.SEEDS[0], **chosen: Any) -> None:
    """One call of `lorakit.surgery.study` on a seed's adapter; its report becomes a record."""
    given = {
        "task": loss(out, "arc_easy"),
        "guards": [loss(out, "openbookqa"), loss(out, "documentation")],
        "policies": POLICIES,
        "sizes": (CENTRE_SIZE,),
        "module_sets": {"residual": None},
        "energies": (CENTRE_ENERGY,),
        "controls": CONTROLS,
    } | chosen

    def report() -> dict[str, Any]:
        adapter = adapter_of(out, seed)
        found = surgery.study(
            str(adapter),
            calibration(out, "arc_easy_calibration.jsonl"),
            base=str(out / "base"),
            options=OPTIONS,
            tokenizer=AutoTokenizer.from_pretrained(out / "base"),
            records=out / "surgery" / f"{adapter.name} {name if name == 'accuracy' else 'loss'}",
            **given,
        )
        return found.to_dict()

    settings = {key: given[key] for key in ("policies", "sizes", "module_sets", "energies", "controls")}
    tools.recorded(STUDY, f"{name} {seed}", report, {**settings, "seed": seed, "dtype": tools.DTYPE})


def centre(out: Path) -> None:
    """Every policy beside its random controls, on every adapter."""
    for seed in tools.SEEDS:
        run(out, "centre", seed)


def accuracy(out: Path) -> None:
    """The centre's edits of the first adapter, by accuracy."""
    task = evaluation.choices(out / "arc_easy_test.jsonl", name="arc_easy")
    guard = evaluation.choices(out / "openbookqa_test.jsonl", name="openbookqa")
    run(out, "accuracy", task=task, guards=[guard])


def sizes(out: Path) -> None:
    """Calibration sizes, three draws of the smaller ones."""
    run(out, "sizes", sizes=SIZES, seeds=tools.SEEDS, policies=("smooth_abs", "grad_direction"))


def modules(out: Path) -> None:
    """Which modules are edited."""
    run(out, "modules", module_sets=MODULE_SETS)


def energies(out: Path) -> None:
    """What is preserved."""
    run(out, "energies", energies=ENERGIES)


def refine(out: Path) -> None:
    """What `refine` decides on every adapter, by loss."""
    for seed in tools.SEEDS:
        settings = {"examples": CENTRE_SIZE, "margin": MARGIN, "seed": seed, "dtype": tools.DTYPE}
        tools.recorded(STUDY, f"refine {seed}", refined, settings, out=out, seed=seed)


def refined(out: Path, seed: int) -> dict[str, Any]:
    """`lorakit.surgery.refine` on a seed's adapter."""
    found = surgery.refine(
        str(adapter_of(out, seed)),
        calibration(out, "arc_easy_calibration.jsonl", "arc_easy_selection.jsonl"),
        task=loss(out, "arc_easy"),
        guards=[loss(out, "openbookqa"), loss(out, "documentation")],
        margin=MARGIN,
        num_examples=CENTRE_SIZE,
        base=str(out / "base"),
        options=OPTIONS,
        tokenizer=AutoTokenizer.from_pretrained(out / "base"),
    )
    return found.to_dict()


def main() -> None:
    stages: dict[str, Callable[[Path], None]] = {
        "centre": centre,
        "accuracy": accuracy,
        "sizes": sizes,
        "modules": modules,
        "energies": energies,
        "refine": refine,
    }
    options = tools.arguments(__doc__, list(stages))
    for stage in options.stage:
        stages[stage](options.out.resolve())


if __name__ == "__main__":
    main()
