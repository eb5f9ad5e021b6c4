"""The tables and figures of docs/lora-lens-study.md, from what benchmarks/lora_lens_study.py trained.

    python benchmarks/lora_lens_report.py DIR [--docs docs]

Writes docs/lora-lens-study/*.png and results.json, and the part of the page between its two marks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lora_lens_study import PROBE_AT, RANK, RANKS, SEEDS, Run, write
from matplotlib.figure import Figure

import lorakit
from lorakit.demo import load_model
from lorakit.lens import Trajectory

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def read(out: Path, run: Run, name: str = "result.json") -> Any:
    path = out / run.name / name
    if not path.exists():
        raise SystemExit(f"{path} is not there: run benchmarks/lora_lens_study.py first.")
    return json.loads(path.read_text())


def sweeps(out: Path) -> dict[str, list[dict[str, Any]]]:
    """For both sweeps and each rank: held-out loss over seeds, and how far above that of r_q = r_v = 16 with the same
    seed, sequence by sequence; its standard error over seeds, and over sequences (of the mean over seeds)."""
    found: dict[str, list[dict[str, Any]]] = {"Q": [], "V": []}
    for sweep, rows in found.items():
        for rank in (RANK, 4, 2):
            per_seed = []
            for seed in SEEDS:
                ranks = (rank, RANK) if sweep == "Q" else (RANK, rank)
                one = read(out, Run(*ranks, seed))
                reference = torch.tensor(read(out, Run(RANK, RANK, seed))["held_out_losses"], dtype=torch.float64)
                losses = torch.tensor(one["held_out_losses"], dtype=torch.float64)
                per_seed.append((float(losses.mean()), losses - reference, one["parameters"]))
            loss, loss_se = mean_and_se([mean for mean, _, _ in per_seed])
            rise, rise_se = mean_and_se([float(difference.mean()) for _, difference, _ in per_seed])
            by_sequence = torch.stack([difference for _, difference, _ in per_seed]).mean(0)
            rows.append(
                {
                    "rank": rank,
                    "parameters": per_seed[0][2],
                    "loss": loss,
                    "loss_se": loss_se,
                    "rise": rise,
                    "rise_se_over_seeds": rise_se,
                    "rise_se_over_sequences": float(by_sequence.std() / len(by_sequence) ** 0.5),
                }
            )
    return found


def fisher_ratios(out: Path) -> list[dict[str, Any]]:
    """V/Q at each probed step: for each seed with its standard error over examples, and over the seeds."""
    probes = {seed: read(out, Run(RANK, RANK, seed), "fisher.json") for seed in SEEDS}
    rows = []
    for step in PROBE_AT:
        ratios = [probes[seed][str(step)]["vq_ratio"] for seed in SEEDS]
        mean, se = mean_and_se([ratio["value"] for ratio in ratios])
        by_layer = [median_over_layers(probes[seed][str(step)]["modules"]) for seed in SEEDS]
        rows.append({"step": step, "ratios": ratios, "mean": mean, "se_over_seeds": se, "layer_medians": by_layer})
    return rows


def median_over_layers(modules: list[dict[str, Any]]) -> float:
    """The median over layers of V/Q within the layer."""
    value, query = (
        {row["layer"]: row["fisher"] for row in modules if row["role"] == role} for role in ("value", "query")
    )
    return statistics.median(value[layer] / query[layer] for layer in value)


def draw_sweeps(found: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.7", lw=1)
    for number, (sweep, rows) in enumerate(found.items()):
        places = [math.log2(row["rank"]) + 0.04 * (2 * number - 1) for row in rows]
        errors = [max(row["rise_se_over_seeds"], row["rise_se_over_sequences"]) for row in rows]
        label = f"r_{sweep} reduced, the other {RANK}"
        axes.errorbar(places, [row["rise"] for row in rows], yerr=errors, fmt="o-", ms=4, capsize=3, label=label)
    axes.set_xticks([math.log2(row["rank"]) for row in rows], [str(row["rank"]) for row in rows])
    axes.set(xlabel="rank", ylabel=f"held-out loss above r_q = r_v = {RANK} (nats)")
    axes.set_title(f"Rank sweeps, {len(SEEDS)} seeds", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def draw_fisher(out: Path, ratios: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, seed in enumerate(SEEDS):
        values = [row["ratios"][i] for row in ratios]
        left.errorbar(
            [row["step"] for row in ratios],
            [value["value"] for value in values],
            yerr=[value["stderr"] for value in values],
            fmt="o-",
            ms=4,
            capsize=3,
            label=f"seed {seed}",
        )
    left.set(xlabel="step", ylabel="V/Q ratio of Fisher information", ylim=(0, None))
    left.legend(fontsize=8)
    probes = read(out, Run(RANK, RANK, 0), "fisher.json")
    for role, colour in (("query", "C0"), ("value", "C1")):
        for step, style in zip(PROBE_AT, (":", "--", "-"), strict=True):
            rows = [row for row in probes[str(step)]["modules"] if row["role"] == role]
            label = f"{role}, step {step}"
            right.plot(
                [row["layer"] for row in rows], [row["fisher"] for row in rows], style, color=colour, label=label
            )
    right.set_yscale("log")
    right.set(xlabel="layer", ylabel="mean squared gradient of a lora_B entry", title="seed 0")
    right.legend(fontsize=7, ncol=2)
    return figure


def draw_gaps(trajectories: dict[int, Trajectory]) -> Figure:
    """LoRA-Lens's Fig. 3 over all seeds: CU of queries and values, and their gap."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for seed, trajectory in trajectories.items():
        for role, colour in (("query", "C0"), ("value", "C1")):
            left.plot(*trajectory.series(f"spectral/cu_{role}"), color=colour, lw=1, label=None if seed else role)
        right.plot(*trajectory.series("spectral/qv_gap"), lw=1, label=f"seed {seed}")
    left.set(xlabel="step", ylabel="capacity utilization", title=f"{len(trajectories)} seeds", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="CU of Q − CU of V", title="Q–V gap")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def tables(results: dict[str, Any]) -> str:
    """The measured part of the page, in Markdown."""
    lines = [f"Before training the held-out loss is {results['base_loss']:.4f}.", ""]
    for sweep, rows in results["sweeps"].items():
        lines += [
            f"**{sweep}-rank sweep** (the other rank {RANK}, {len(SEEDS)} seeds; held-out loss ± standard error over "
            f"seeds; its rise above rank {RANK}, paired, with standard errors over seeds and over sequences, and as a "
            f"part of what training gains)",
            "",
            f"| r_{sweep} | parameters | held-out loss | rise | ± seeds | ± sequences | of the gain |",
            "|---|---|---|---|---|---|---|",
        ]
        gain = results["base_loss"] - rows[0]["loss"]
        for row in rows:
            rise = (
                "| 0 | – | – | – |"
                if row["rank"] == RANK
                else f"| {row['rise']:+.4f} | {row['rise_se_over_seeds']:.4f} | {row['rise_se_over_sequences']:.4f} "
                f"| {row['rise'] / gain:.1%} |"
            )
            lines.append(f"| {row['rank']} | {row['parameters']:,} | {row['loss']:.4f} ± {row['loss_se']:.4f} {rise}")
        lines.append("")
    lines += [
        "**V/Q ratio of Fisher information** (± standard error over 16 examples; mean: over seeds; then the median "
        "over layers of the ratio within a layer, for each seed)",
        "",
        "| step | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean | layers |",
        "|---|" + "---|" * (len(SEEDS) + 2),
    ]
    for row in results["fisher"]:
        cells = [f"{ratio['value']:.1f} ± {ratio['stderr']:.1f}" for ratio in row["ratios"]]
        cells.append(f"{row['mean']:.1f} ± {row['se_over_seeds']:.1f}")
        cells.append(", ".join(f"{median:.1f}" for median in row["layer_medians"]))
        lines.append(f"| {row['step']} | " + " | ".join(cells) + " |")
    lines += ["", "**Capacity utilization** (seed 0)", ""]
    lines += ["| rank | condition | all | Q | V | Q–V gap |", "|---|---|---|---|---|---|"]
    for adapter in results["conditions"]:
        for condition in ("init", "random", "trained"):
            cells = [adapter["groups"][name][condition] for name in ("all", "query", "value")]
            cells.append(adapter["gap"][condition])
            text = " | ".join("–" if cell is None else f"{cell:.3f}" for cell in cells)
            lines.append(f"| {adapter['rank']} | {condition} | {text} |")
    spread = ", ".join(
        f"seed {seed}: {cu['all']:.3f} (Q {cu['query']:.3f}, V {cu['value']:.3f})"
        for seed, cu in results["seeds"].items()
    )
    law = results["law"]
    lines += [
        "",
        f"At rank {RANK} over seeds: {spread}.",
        "",
        f"**Scaling law** r̂ = a · r^β over ranks {', '.join(map(str, RANKS))} (seed 0): "
        + "; ".join(
            f"{name}: a = {one['a']:.3f}, β = {one['beta']:.3f}, R² = {one['r_squared']:.4f}"
            for name, one in law.items()
        )
        + ".",
        "",
        f"**Pretrained against adapter effective rank**, all {results['correlation']['modules']} linear modules: "
        f"Pearson r = {results['correlation']['pearson']:.3f}; of random factors of the same shapes "
        f"{results['correlation']['random_pearson']:.3f}. Within roles: "
        + ", ".join(
            f"{name} {value:.2f}" for name, value in results["correlation"]["roles"].items() if value is not None
        )
        + ".",
    ]
    return "\n".join(lines)


def report(out: Path, docs: Path) -> None:
    """Write the figures, results.json, and the measured part of the page."""
    figures = docs / "lora-lens-study"
    figures.mkdir(parents=True, exist_ok=True)
    adapters = [str(out / Run(rank, rank, 0).name / "adapter") for rank in RANKS]
    conditions = lorakit.lens.conditions(adapters)
    law = lorakit.lens.scaling_law(adapters)
    correlation = lorakit.lens.rank_correlation(
        str(out / Run(RANK, RANK, 0, True).name / "adapter"), load_model(None)[0]
    )
    found, ratios = sweeps(out), fisher_ratios(out)
    trajectories = {seed: Trajectory.read(out / Run(RANK, RANK, seed).name / "spectra.jsonl") for seed in SEEDS}
    drawn = {
        "conditions": conditions.plot(RANKS.index(RANK)),
        "trajectory": trajectories[0].plot(),
        "gaps": draw_gaps(trajectories),
        "fisher": draw_fisher(out, ratios),
        "sweeps": draw_sweeps(found),
        "scaling_law": law.plot(),
        "correlation": correlation.plot(),
    }
    for name, figure in drawn.items():
        figure.savefig(figures / f"{name}.png", dpi=100)
    base_losses = json.loads((out / "base.json").read_text())["held_out_losses"]
    results = {
        "settings": read(out, Run(RANK, RANK, 0))["settings"],
        "base_loss": statistics.fmean(base_losses),
        "sweeps": found,
        "fisher": ratios,
        "conditions": [
            {
                "rank": rank,
                "groups": {
                    group.name: {"init": group.init, "random": group.random, "trained": group.trained}
                    for group in (one.total, *one.roles)
                },
                "gap": one.qv_gap,
            }
            for rank, one in zip(RANKS, conditions.adapters, strict=True)
        ],
        "seeds": {
            seed: {
                "all": trajectory.snapshots[-1].total.capacity_utilization,
                **{group.name: group.capacity_utilization for group in trajectory.snapshots[-1].roles},
            }
            for seed, trajectory in trajectories.items()
        },
        "law": {fit.name: vars(fit.law) for fit in (law.total, *law.roles) if fit.law is not None},
        "correlation": {
            "modules": correlation.total.modules,
            "pearson": correlation.total.pearson,
            "random_pearson": correlation.total.random_pearson,
            "roles": {group.name: group.pearson for group in correlation.roles},
        },
        "trajectories": {
            seed: {
                metric: list(zip(*trajectory.series(f"spectral/{metric}"), strict=True))
                for metric in ("cu_query", "cu_value", "qv_gap", "kappa_query", "kappa_value")
            }
            for seed, trajectory in trajectories.items()
        },
    }
    write(figures / "results.json", results)
    page = docs / "lora-lens-study.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{after}")
    print(tables(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", help="what lora_lens_study.py wrote")
    parser.add_argument("--docs", default="docs")
    options = parser.parse_args()
    report(Path(options.directory), Path(options.docs))


if __name__ == "__main__":
    main()
