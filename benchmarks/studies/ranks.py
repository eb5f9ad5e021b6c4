"""Study 5, the low-rank assumption: trained on ARC-Easy; ARC-Easy is the in-domain set, OpenBookQA the shifted one.

    python benchmarks/studies/ranks.py STAGE... --data DIR --out DIR

Stages: `sweep` (uniform ranks 1 to 64, three seeds, at the learning rate that is best for rank 16 on validation loss),
`layers` (one layer alone is adapted, beside its Fisher information), `select` (`lorakit.experiments.select_ranks`
against uniform and shuffled ranks), `pilot` (the spectrum of a short full fine-tuning's ΔW beside those of adapters).
Each is resumable; records are in `records/ranks`, those of `select` in `--out`/select.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import tools
from peft import LoraConfig
from transformers import AutoTokenizer

from lorakit import evaluation, experiments, fisher, lens
from lorakit.data import loader

STUDY = "ranks"
RANKS = (1, 2, 4, 8, 16, 64)
STEPS, DATA = 120, "arc_easy_alone.jsonl"
LAYER_STEPS = 30
PILOT = {"steps": 60, "learning_rate": 2e-5}


def lora(rank: int) -> LoraConfig:
    """A LoRA in all linear modules, at scaling 2."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def trained(out: Path, rank: int, rate: float, seed: int) -> tuple[str, Path, dict[str, Any]]:
    """One training of the sweep: its title, its adapter, and its record."""
    title = f"rank {rank} lr {rate:g} seed {seed}"
    adapter = out / "adapters" / f"ranks-{title.replace(' ', '-')}"
    settings = {"data": DATA, "steps": STEPS, "learning_rate": rate, "seed": seed, "r": rank, "group_by_length": True}
    train = functools.partial(tools.train, out, lora(rank), adapter)
    given = {"seed": seed, "learning_rate": rate, "steps": STEPS, "data": DATA}
    return title, adapter, tools.recorded(STUDY, title, train, settings, **given)


def rate_of(out: Path) -> float:
    """The rate of the grid that is best for rank 16."""
    return tools.best_rate({rate: trained(out, 16, rate, tools.SEEDS[0])[2] for rate in tools.GRID})


def sweep(out: Path) -> None:
    """Every rank with every seed, scored on both sets."""
    rate = rate_of(out)
    for seed in tools.SEEDS:
        for rank in RANKS:
            title, adapter, _ = trained(out, rank, rate, seed)
            settings = {"adapter": title, "dtype": tools.DTYPE}
            tools.recorded(STUDY, f"scores of {title}", tools.score, settings, out=out, adapter=adapter)


def examples(out: Path, name: str, **options: Any) -> Any:
    """A loader of one of the files of `out`."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    return loader(out / name, tokenizer, length=tools.LENGTH, batch_size=tools.BATCH_SIZE, progress=False, **options)


def layers(out: Path) -> None:
    """What each layer alone gains, at rank 8 and few steps, and the Fisher information of each layer before."""
    tools.recorded(STUDY, "probe", probed, {"examples": 64}, out=out)
    settings = {"steps": LAYER_STEPS, "r": 8, "learning_rate": rate_of(out), "group_by_length": True}
    tools.recorded(STUDY, "layer gains", gains, settings, out=out)


def probed(out: Path) -> dict[str, Any]:
    """The Fisher information of all linear modules of the base model."""
    report = fisher.probe(
        evaluation.load_base(str(out / "base")),
        examples(out, "arc_easy_calibration.jsonl", num_examples=64),
        target_modules="all-linear",
        num_examples=64,
        progress=False,
    )
    return {"modules": [{"module_name": row.module_name, "fisher": row.fisher} for row in report.modules]}


def gains(out: Path) -> dict[str, Any]:
    """`lorakit.experiments.adapt_each_layer`, judged by the loss of the selection documents."""
    data = examples(out, DATA)
    held = list(examples(out, "arc_easy_selection.jsonl"))
    found = experiments.adapt_each_layer(
        str(out / "base"),
        lora(8),
        data.dataset,
        functools.partial(losses, held),
        steps=LAYER_STEPS,
        batch_size=tools.BATCH_SIZE,
        learning_rate=rate_of(out),
        schedule="linear",
        group_by_length=True,
        collate_fn=data.collate_fn,
        records=out / "layer-gains",
    )
    return found.to_dict()


def losses(batches: Any, model: Any) -> list[float]:
    """The loss of each held-out document."""
    task = evaluation.loss(batches)
    return [-score for score in evaluation.evaluate(model, task, progress=False)["loss"].scores]


def select(out: Path) -> None:
    """Ranks chosen by measurement, at the parameters of a uniform rank, and its controls."""
    tasks = {
        name: evaluation.loss(str(out / f"{name}_loss.jsonl"), length=tools.LENGTH, batch_size=tools.BATCH_SIZE)
        for name in tools.SETS
    }
    report = experiments.select_ranks(
        str(out / "base"),
        lora(16),
        str(out / DATA),
        tasks=tasks["arc_easy"],
        shifted=tasks["openbookqa"],
        budget=1.0,
        tolerance=0.02,
        steps=STEPS,
        batch_size=tools.BATCH_SIZE,
        learning_rate=rate_of(out),
        schedule="linear",
        group_by_length=True,
        records=out / "select",
    )
    text = json.dumps(report.to_dict(), indent=1)
    (tools.RECORDS / STUDY / "select.json").write_text(text + "\n", encoding="utf-8")


def pilot(out: Path) -> None:
    """C(r) of a short full fine-tuning's ΔW, and of the sweep's adapters of rank 64."""
    tools.recorded(STUDY, "pilot", full_spectra, PILOT, out=out)
    rate = rate_of(out)
    for seed in tools.SEEDS:
        title, adapter, _ = trained(out, 64, rate, seed)
        tools.recorded(STUDY, f"spectra of {title}", adapter_spectra, {"adapter": title}, adapter=adapter)


def full_spectra(out: Path) -> dict[str, Any]:
    """`lorakit.experiments.pilot.update_spectra` on the sweep's data."""
    data = examples(out, DATA)
    report = experiments.pilot.update_spectra(
        evaluation.load_base(str(out / "base")),
        data.dataset,
        batch_size=tools.BATCH_SIZE,
        collate_fn=data.collate_fn,
        group_by_length=True,
        progress=False,
        **PILOT,
    )
    return {"modules": [dataclasses.asdict(row) for row in report.modules]}


def adapter_spectra(adapter: Path) -> dict[str, Any]:
    """The audit of an adapter by module."""
    return {"modules": lens.audit(adapter).to_dict()["modules"]}


def main() -> None:
    stages = {"sweep": sweep, "layers": layers, "select": select, "pilot": pilot}
    options = tools.arguments(__doc__, list(stages))
    for stage in options.stage:
        stages[stage](options.out.resolve())


if __name__ == "__main__":
    main()
