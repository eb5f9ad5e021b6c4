"""Study 4, compression: is half the rank enough, and which number of an audit foretells it? ARC-Easy, rank 64.

    python benchmarks/studies/compression.py STAGE... --data DIR --out DIR

Stages, in order: `tune` (the learning rate of rank 64, by validation loss, seed 0), `bench` (probes, and adapters
retrained at and cut to suggested ranks, three seeds), `ladder` (the probes cut to 32, 16, …, 1), `layers` (one layer at
a time cut to rank 1). Each is resumable; records are in `records/compression`, the bench in `--out`/bench.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tools
from peft import LoraConfig
from transformers import AutoTokenizer

from lorakit import compress, evaluation, experiments, lens
from lorakit.adapters import open_adapter

STUDY = "compression"
STEPS, RANK = 120, 64
LADDER = (32, 16, 8, 4, 2, 1)
LAYER_RANK = 1  # what one layer's modules are cut to, the others whole
MARGIN = 0.02
DATA = "arc_easy_alone.jsonl"
BENCH = {
    "policies": ["global_median", RANK // 2],
    "batch_size": tools.BATCH_SIZE,
    "schedule": "linear",
    "group_by_length": True,
    "seeds": list(tools.SEEDS),
}


def tune(out: Path) -> float:
    """The rate of the grid with the lowest validation loss."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    found = {}
    for rate in tools.GRID:
        title = f"tune lr {rate:g}"
        train = functools.partial(tools.train, out, config, out / "adapters" / title.replace(" ", "-"))
        given = {"data": DATA, "steps": STEPS, "learning_rate": rate, "seed": tools.SEEDS[0]}
        settings = {**given, "r": RANK, "group_by_length": True}
        found[rate] = tools.recorded(STUDY, title, train, settings, **given)
    return tools.best_rate(found)


def bench(out: Path) -> experiments.BenchReport:
    """The bench of `lorakit.experiments.bench`; its report is copied to the records."""
    report = experiments.bench(
        str(out / "base"),
        {"source": str(out / DATA), "length": tools.LENGTH},
        tasks=[
            evaluation.choices(out / "arc_easy_test.jsonl", name="arc_easy"),
            evaluation.loss(str(out / "arc_easy_loss.jsonl"), length=tools.LENGTH, margin=0.05),
        ],
        margin=MARGIN,
        probe={"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"},
        directory=out / "bench",
        steps=STEPS,
        learning_rate=tune(out),
        options=evaluation.LoadOptions(dtype=tools.DTYPE),
        **BENCH,
    )
    report.save(tools.RECORDS / STUDY / "bench")
    return report


def scored(out: Path, adapter: Path, ranks: Any, cut: Path, *, choices: bool) -> dict[str, Any]:
    """Cut an adapter, and score it on ARC-Easy: accuracy where asked for, and loss; with the energy that is kept."""
    report = compress.truncate(adapter, cut, ranks=ranks, pad=False, overwrite=True)
    base = str(out / "base")
    tasks = [evaluation.choices(out / "arc_easy_test.jsonl", name="arc_easy")] if choices else []
    tasks.append(evaluation.loss(str(out / "arc_easy_loss.jsonl"), length=tools.LENGTH, batch_size=tools.BATCH_SIZE))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = evaluation.load_adapted(base, str(cut), evaluation.LoadOptions(dtype=tools.DTYPE))
    found = evaluation.evaluate(model, tasks, tokenizer=tokenizer, progress=False)
    scores = {name: {"documents": list(s.documents), "scores": list(s.scores)} for name, s in found.items()}
    return {"energy_kept": report.energy_kept, "parameters": report.parameters, **scores}


def probes(out: Path) -> dict[int, Path]:
    """The bench's adapters of rank 64, by seed."""
    report = json.loads((out / "bench" / "bench.json").read_text(encoding="utf-8"))
    return dict(zip(tools.SEEDS, map(Path, report["probe"]["adapters"]), strict=True))


def ladder(out: Path) -> None:
    """Every probe cut to every rank of the ladder, and what an audit says of the probe."""
    for seed, adapter in probes(out).items():
        for rank in LADDER:
            title = f"rank {rank} seed {seed}"
            tools.recorded(
                STUDY,
                title,
                scored,
                {"rank": rank, "seed": seed, "dtype": tools.DTYPE},
                out=out,
                adapter=adapter,
                ranks=rank,
                cut=out / "cuts" / title.replace(" ", "-"),
                choices=True,
            )


def layers(out: Path) -> None:
    """Every probe with one layer cut to rank 1, scored by loss alone, beside the audit's numbers of that layer."""
    for seed, adapter in probes(out).items():
        tools.recorded(STUDY, f"audit seed {seed}", audited, {"seed": seed}, adapter=adapter)
        names = [module.module_name for module in open_adapter(adapter).modules]
        for layer in range(max(int(name.split(".")[2]) for name in names) + 1):
            title = f"layer {layer} seed {seed}"
            ranks = {name: LAYER_RANK for name in names if name.split(".")[2] == str(layer)}
            tools.recorded(
                STUDY,
                title,
                scored,
                {"layer": layer, "rank": LAYER_RANK, "seed": seed, "dtype": tools.DTYPE},
                out=out,
                adapter=adapter,
                ranks=ranks,
                cut=out / "cuts" / title.replace(" ", "-"),
                choices=False,
            )


def audited(adapter: Path) -> dict[str, Any]:
    """The numbers of an audit by module."""
    report = lens.audit(adapter, energy=0.9)
    return {"modules": report.to_dict()["modules"]}


def main() -> None:
    options = tools.arguments(__doc__, ("tune", "bench", "ladder", "layers"))
    for stage in options.stage:
        {"tune": tune, "bench": bench, "ladder": ladder, "layers": layers}[stage](options.out.resolve())


if __name__ == "__main__":
    main()
