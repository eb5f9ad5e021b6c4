"""docs/studies/fisherlora.md, from the records of `fisherlora.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pages
import tools
from fisherlora import FRACTIONS, STEPS
from pages import Claim, Row

from lorakit.statistics import Interval

ARMS = {
    "uniform": "uniform r = 16 in queries and values",
    "uniform_reduced": "uniform r = 8",
    "uniform_equal": "uniform r = 9, and 8 in every third layer's queries",
    "fisherlora": "FisherLoRA: queries 4, values 16",
    "fisher": "by each module's Fisher information",
    "spectral": "opposite: queries large, values small",
    "shuffled": "Fisher's ranks, shuffled within queries and within values",
    "adalora": "AdaLoRA",
    "eva": "EVA",
    "all_linear": "uniform r = 16 in all linear modules",
}
MARGIN, LOSS_MARGIN = 0.02, 0.05  # of accuracy; nats a token of the right answer
ACCURACY, LOSS = tools.SETS, tuple(f"{name}_loss" for name in tools.SETS)
# A claim, its two sides, what the papers say, and whether it is that nothing is lost.
PAIRS = (
    ("queries at rank 4 cost nothing", "fisherlora", "uniform", "no significant change of accuracy", True),
    (
        "at equal parameters, values large and queries small is better than uniform",
        "fisherlora",
        "uniform_equal",
        "",
        False,
    ),
    (
        "keeping V and shrinking Q is better than the opposite, at equal parameters",
        "fisherlora",
        "spectral",
        "0.006 against 0.067 of accuracy lost at worst",
        False,
    ),
    ("ranks by each module's Fisher information are better than the rule by role", "fisher", "fisherlora", "", False),
    ("it matters which layer's queries and values have which rank", "fisher", "shuffled", "", False),
    ("FisherLoRA is better than AdaLoRA, at equal parameters", "fisherlora", "adalora", "", False),
    ("FisherLoRA is better than EVA, at equal parameters", "fisherlora", "eva", "", False),
    ("queries and values are enough", "uniform", "all_linear", "", True),
    ("half the rank costs nothing", "uniform_reduced", "uniform", "half the rank: +0.2 points", True),
)


@dataclass(frozen=True)
class Arm:
    """An arm whose learning rate was chosen, and the seeds that were scored at it."""

    name: str
    rate: float
    parameters: int
    scores: list[Row]

    @property
    def whole(self) -> bool:
        return len(self.scores) == len(tools.SEEDS)

    def mean(self, task: str) -> float:
        """The mean score over seeds and documents."""
        means = [sum(record[task]["scores"]) / len(record[task]["scores"]) for record in self.scores]
        return sum(means) / len(means)


def arms_of(found: Mapping[str, Row]) -> dict[str, Arm]:
    """The arms with all seeds, in the order of `ARMS`."""
    arms = {}
    for name in ARMS:
        rate = pages.best_rate(found, {rate: title(name, rate, tools.SEEDS[0]) for rate in tools.GRID})
        if rate is None:
            continue
        scores = [found.get(f"scores of {title(name, rate, seed)}") for seed in tools.SEEDS]
        parameters = found[title(name, rate, tools.SEEDS[0])]["parameters"]
        arm = Arm(name, rate, parameters, [row for row in scores if row is not None])
        if arm.whole:
            arms[name] = arm
    return arms


def title(arm: str, rate: float, seed: int) -> str:
    """As `fisherlora.Cell.title`."""
    return f"{arm} lr {rate:g} seed {seed}"


def build() -> list[Claim]:
    """Write the page; the rows of the index."""
    found = pages.records("fisherlora")
    arms = arms_of(found)
    rows = [
        {
            "claim": claim,
            "candidate": candidate,
            "reference": reference,
            "paper": paper,
            "kept": kept,
            "accuracy": pages.difference(arms[reference].scores, arms[candidate].scores, ACCURACY),
            "loss": pages.difference(arms[reference].scores, arms[candidate].scores, LOSS),
        }
        for claim, candidate, reference, paper, kept in PAIRS
        if {candidate, reference} <= arms.keys()
    ]
    if not {"uniform", "fisherlora"} <= arms.keys():
        return []
    pages.forest(
        pages.DOCS / "fisherlora" / "loss.png",
        [(f"{row['candidate']} − {row['reference']}", row["loss"]) for row in rows],
        "difference of minus the held-out loss, nats a token of the right answer",
    )
    text = pages.template("fisherlora")
    for name, value in (
        ("arms", arms_table(arms, found.get("scores of the base model"))),
        ("claims", claims_table(rows)),
        ("ratios", ratios_table(found, arms)),
        ("left", left_out(found, arms)),
        ("steps", str(STEPS)),
        ("grid", ", ".join(f"{rate:g}" for rate in tools.GRID)),
        ("seeds", ", ".join(map(str, tools.SEEDS))),
        ("fewer", f"{100 * (1 - arms['fisherlora'].parameters / arms['uniform'].parameters):.0f}"),
    ):
        text = text.replace(f"<{name}>", value)
    pages.save("fisherlora", text)
    return [claim_of(row) for row in rows]


def arms_table(arms: Mapping[str, Arm], base: Row | None) -> str:
    """Every arm's parameters, learning rate and scores; the base model first."""
    tasks = (*ACCURACY, *LOSS, "documentation")
    everything = [("no adapter", "–", "–", [Arm("", 0, 0, [base]).mean(task) for task in tasks])] if base else []
    for name, arm in arms.items():
        rate = f"{arm.rate:g}" + (" (edge)" if arm.rate in (min(tools.GRID), max(tools.GRID)) else "")
        everything.append((ARMS[name], f"{arm.parameters:,}", rate, [arm.mean(task) for task in tasks]))
    return pages.table(
        ("ranks", "parameters", "learning rate", "ARC-Easy", "OpenBookQA", "loss, ARC", "loss, OBQA", "documentation"),
        [
            (name, parameters, rate, *(f"{100 * v:.1f}" for v in means[:2]), *(f"{-v:.3f}" for v in means[2:]))
            for name, parameters, rate, means in everything
        ],
    )


def left_out(found: Mapping[str, Row], arms: Mapping[str, Arm]) -> str:
    """What has no record yet."""
    missing = [f"the arm *{label}*" for name, label in ARMS.items() if name not in arms]
    missing += [f"{share} of the data" for share in FRACTIONS if f"{title(f'uniform_{share}', 1e-3, 0)}" not in found]
    if "probe at the start" not in found:
        missing.append("V/Q at the start and after the training")
    return "\n".join(f"* {line}" for line in missing) or "Nothing."


def verdict(found: Interval, kept: bool, margin: float) -> str:
    """In words, of a claim that nothing is lost or of one that something is better."""
    return pages.WORDS[found.verdict(margin)] if kept else pages.better(found)


def claims_table(rows: list[Row]) -> str:
    """Every pair of arms."""
    return pages.table(
        ("claim", "accuracy, points", "minus the loss", "by accuracy", "by loss", "for 2 points"),
        [
            (
                row["claim"],
                pages.shown(row["accuracy"], 100),
                pages.shown(row["loss"]),
                verdict(row["accuracy"], row["kept"], MARGIN),
                verdict(row["loss"], row["kept"], LOSS_MARGIN),
                pages.needed(row["accuracy"], MARGIN),
            )
            for row in rows
        ],
    )


def ratios_table(found: Mapping[str, Row], arms: Mapping[str, Arm]) -> str:
    """The ratio of the values' to the queries' mean Fisher information, at the stages that were probed."""
    stages = {"at the start": "probe at the start", "after 50 steps": "probe after 50 steps"}
    if "uniform" in arms:
        titles = {seed: title("uniform", arms["uniform"].rate, seed) for seed in tools.SEEDS}
        stages |= {f"after {STEPS} steps, seed {seed}": f"probe of {name}" for seed, name in titles.items()}
    return pages.table(
        ("stage", "V/Q", "90 % interval"),
        [
            (
                stage,
                f"{found[key]['vq_ratio']:.1f}",
                "–" if found[key]["vq_interval"] is None else "{:.1f} to {:.1f}".format(*found[key]["vq_interval"]),
            )
            for stage, key in stages.items()
            if key in found
        ],
    )


def claim_of(row: Row) -> Claim:
    """A row of the index."""
    accuracy, loss = verdict(row["accuracy"], row["kept"], MARGIN), verdict(row["loss"], row["kept"], LOSS_MARGIN)
    return Claim(
        claim=row["claim"],
        paper=row["paper"] or "–",
        ours=f"{pages.shown(row['accuracy'], 100)} points; −loss {pages.shown(row['loss'])}",
        verdict=pages.both(accuracy, loss),
        documents=str(row["accuracy"].n),
        seeds=str(len(tools.SEEDS)),
        link="[FisherLoRA](fisherlora.md)",
    )
