"""docs/studies/ranks.md, from the records of `ranks.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pages
import tools
import torch
from pages import Claim, Row
from ranks import RANKS

from lorakit import spectral
from lorakit._figures import new_figure

LINK = "[ranks](ranks.md)"
MARGIN, LOSS_MARGIN = 0.02, 0.05
NAMES = {"arc_easy": "ARC-Easy (in-domain)", "openbookqa": "OpenBookQA (shifted)"}


def build() -> list[Claim]:
    """Write the page; the rows of the index."""
    found = pages.records("ranks")
    rate = pages.best_rate(found, {rate: f"rank 16 lr {rate:g} seed {tools.SEEDS[0]}" for rate in tools.GRID})
    if rate is None or any(f"scores of {title(r, rate, s)}" not in found for r in RANKS for s in tools.SEEDS):
        return []
    parts = [sweep_section(found, rate)]
    claims = sweep_claims(found, rate)
    for key, write in (("layer gains", layers_part), ("pilot", pilot_part)):
        if key in found:
            section, claim = write(found, rate)
            parts.append(section)
            claims.append(claim)
    file = pages.HERE / "records" / "ranks" / "select.json"
    if file.exists():
        selected = json.loads(file.read_text(encoding="utf-8"))
        parts.append(select_section(selected))
        claims.append(select_claim(selected))
    pages.save("ranks", pages.template("ranks").replace("<sections>", "\n\n".join(parts)))
    return claims


def title(rank: int, rate: float, seed: int) -> str:
    """As `ranks.trained`."""
    return f"rank {rank} lr {rate:g} seed {seed}"


def scores(found: Mapping[str, Row], rate: float, rank: int) -> list[Row]:
    """The scores of a rank's seeds."""
    return [found[f"scores of {title(rank, rate, seed)}"] for seed in tools.SEEDS]


def sweep_section(found: Mapping[str, Row], rate: float) -> str:
    """Every rank beside the largest, on both sets."""
    tables = []
    figure = new_figure(9, 3.4)
    for axes, (name, label) in zip(figure.subplots(1, 2), NAMES.items(), strict=True):
        rows = []
        for rank in RANKS:
            accuracy = pages.difference(scores(found, rate, RANKS[-1]), scores(found, rate, rank), [name])
            loss = pages.difference(scores(found, rate, RANKS[-1]), scores(found, rate, rank), [f"{name}_loss"])
            means = [sum(row[name]["scores"]) / len(row[name]["scores"]) for row in scores(found, rate, rank)]
            parameters = found[title(rank, rate, tools.SEEDS[0])]["parameters"]
            rows.append(
                (
                    rank,
                    f"{parameters:,}",
                    f"{100 * sum(means) / len(means):.1f}",
                    "–" if rank == RANKS[-1] else pages.shown(accuracy, 100),
                    "–" if rank == RANKS[-1] else pages.shown(loss),
                    "–" if rank == RANKS[-1] else pages.WORDS[loss.verdict(LOSS_MARGIN)],
                )
            )
            if rank != RANKS[-1]:
                axes.errorbar(
                    rank,
                    loss.difference,
                    [[loss.difference - loss.lower], [loss.upper - loss.difference]],
                    fmt="o",
                    color="tab:blue",
                )
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rank", ylabel=f"minus the loss, to rank {RANKS[-1]}", title=label)
        headings = (
            "rank",
            "parameters",
            "accuracy",
            f"points to rank {RANKS[-1]}",
            "minus the loss",
            "as good, by loss",
        )
        tables.append(f"**{label}**\n\n{pages.table(headings, rows)}")
    (pages.DOCS / "ranks").mkdir(parents=True, exist_ok=True)
    figure.savefig(pages.DOCS / "ranks" / "sweep.png", dpi=110)
    return "## A sweep of ranks\n\n" + "\n\n".join(tables) + "\n\n![The sweep](ranks/sweep.png)"


def sweep_claims(found: Mapping[str, Row], rate: float) -> list[Claim]:
    """Is a small rank enough, where the data are those of the training and where they are not?"""
    claims = []
    for name, label in NAMES.items():
        accuracy = pages.difference(scores(found, rate, 64), scores(found, rate, 8), [name])
        loss = pages.difference(scores(found, rate, 64), scores(found, rate, 8), [f"{name}_loss"])
        claims.append(
            Claim(
                claim=f"rank 8 is as good as rank 64, {label}",
                paper="the update of a task has a low rank",
                ours=f"{pages.shown(accuracy, 100)} points; −loss {pages.shown(loss)}",
                verdict=pages.both(pages.WORDS[accuracy.verdict(MARGIN)], pages.WORDS[loss.verdict(LOSS_MARGIN)]),
                documents=str(accuracy.n),
                seeds=str(len(tools.SEEDS)),
                link=LINK,
            )
        )
    return claims


def _by_layer(modules: list[Row], number: Callable[[Row], float]) -> dict[str, float]:
    """The mean of a number over each layer's modules."""
    layers: dict[str, list[float]] = {}
    for module in modules:
        layers.setdefault(module["module_name"].split(".")[2], []).append(number(module))
    return {layer: sum(values) / len(values) for layer, values in layers.items()}


def _correlated(name: str, numbers: Any, outcomes: Any) -> tuple[str, str]:
    """A rank correlation with its interval, and what it says."""
    rho, low, high = pages.rank_correlation(numbers, outcomes)
    verdict = "held" if low > 0 else "not held" if high < 0 else "not decided"
    return f"{name} {rho:+.2f} [{low:+.2f}, {high:+.2f}]", verdict


def layers_part(found: Mapping[str, Row], _: float) -> tuple[str, Claim]:
    """What each layer gains alone, beside its Fisher information before the training."""
    gains = {group["name"]: group["gain"] for group in found["layer gains"]["groups"]}
    fisher = _by_layer(found["probe"]["modules"], lambda module: module["fisher"])
    layers = sorted(fisher, key=int)
    by_number = {"".join(filter(str.isdigit, name)): gain for name, gain in gains.items()}
    shown, verdict = _correlated(
        "Spearman", [[fisher[layer] for layer in layers]], [[by_number[layer]["value"] for layer in layers]]
    )
    rows = [(layer, f"{fisher[layer]:.3g}", f"{by_number[layer]['value']:+.4f}") for layer in layers]
    section = (
        "## One layer alone\n\nThe mean Fisher information of a layer's modules in the base model, and how far the "
        f"held-out loss falls where only that layer is adapted. {shown}.\n\n"
        + pages.table(("layer", "Fisher information", "gain"), rows)
    )
    claim = Claim(
        claim="the layers whose Fisher information is largest are those that gain most when they are adapted alone",
        paper="sensitivity decides on ranks",
        ours=shown,
        verdict=verdict,
        documents="64",
        seeds="1",
        link=LINK,
    )
    return section, claim


def pilot_part(found: Mapping[str, Row], rate: float) -> tuple[str, Claim]:
    """Does a short full fine-tuning foretell which of an adapter's modules use many directions?"""
    full = {
        row["module_name"]: float(spectral.effective_rank(torch.tensor(row["singular_values"], dtype=torch.float64)))
        for row in found["pilot"]["modules"]
    }
    adapters = [
        {row["module_name"]: row["effective_rank"] for row in found[f"spectra of {title(64, rate, seed)}"]["modules"]}
        for seed in tools.SEEDS
        if f"spectra of {title(64, rate, seed)}" in found
    ]
    names = sorted(full.keys() & adapters[0].keys())
    shown, verdict = _correlated(
        "Spearman",
        [[full[name] for name in names]] * len(adapters),
        [[row[name] for name in names] for row in adapters],
    )
    claim = Claim(
        claim="a short full fine-tuning foretells which modules of an adapter have a large effective rank",
        paper="the spectrum of ΔW decides on the rank",
        ours=shown,
        verdict=verdict,
        documents="–",
        seeds=str(len(adapters)),
        link=LINK,
    )
    section = (
        f"## Pilots\n\nEffective ranks of {len(names)} modules: of ΔW after a pilot, and of adapters of rank 64. "
        f"{shown}."
    )
    return section, claim


def select_section(selected: Row) -> str:
    """What `select_ranks` chose, and its controls."""
    rows = [
        (
            arm["name"],
            arm["reference"],
            name,
            pages.bounds(bounds["difference"], bounds["lower"], bounds["upper"]),
            arm["verdict"],
        )
        for arm in selected["confirmation"]
        for name, bounds in arm["against"].items()
    ]
    return (
        f"## `select_ranks`\n\nIt chose rank {selected['rank']}; redistributed ranks: {selected['redistribution']}.\n\n"
        + pages.table(("ranks", "against", "set", "minus the loss", "verdict"), rows)
    )


def select_claim(selected: Row) -> Claim:
    """Do measured ranks beat uniform and shuffled ones?"""
    differences = [
        f"{arm['name']} {pages.bounds(bounds['difference'], bounds['lower'], bounds['upper'])}"
        for arm in selected["confirmation"]
        for name, bounds in arm["against"].items()
        if name == "arc_easy"
    ]
    return Claim(
        claim="ranks by measured gains beat uniform ones at equal parameters",
        paper="–",
        ours=f"−loss to {selected['confirmation'][0]['reference']}: {'; '.join(differences)}",
        verdict={"confirmed": "held", "worse": "not held"}.get(selected["redistribution"], "not decided"),
        documents="500",
        seeds=str(len(selected["seeds"])),
        link=LINK,
    )
