"""docs/studies/fisherlora.md, from the records of the FisherLoRA study."""

from __future__ import annotations

from typing import Any

import pages
import tools
from fisherlora import ARMS, FRACTION_ARMS, FRACTIONS

ACCURACY, LOSS = tools.SETS, tuple(f"{name}_loss" for name in tools.SETS)
MARGIN, LOSS_MARGIN = 0.02, 0.02  # two points; nats a token
LABELS = {
    "all_linear": "uniform, r = 16, all linear modules",
    "uniform": "uniform, r = 16",
    "uniform_reduced": "uniform, reduced",
    "fisherlora": "FisherLoRA: r_q = 4, r_v = 16",
    "fisher": "by Fisher information of each module",
    "spectral": "opposite: r_q = 16, r_v smaller",
    "shuffled": "the ranks of the row before last, shuffled",
    "adalora": "AdaLoRA",
    "eva": "EVA",
}
LABELS["shuffled"] = "the Fisher ranks, shuffled"


class Arm:
    """What one arm left: its chosen learning rate, its parameters and the scores of its seeds."""

    def __init__(self, name: str, found: dict[str, dict[str, Any]]) -> None:
        self.name = name
        trained = {key: row for key, row in found.items() if key.startswith(f"{name} lr ")}
        first = [row for row in trained.values() if row["settings"]["seed"] == tools.SEEDS[0]]
        self.validation = {row["settings"]["learning_rate"]: pages.mean(row["validation"]) for row in first}
        self.rate = min(self.validation, key=self.validation.__getitem__, default=None)
        self.scores = [
            found[key]
            for seed in tools.SEEDS
            if self.rate is not None and (key := f"scores of {name} lr {self.rate:g} seed {seed}") in found
        ]
        self.parameters = [
            row["parameters"] for row in trained.values() if row["settings"]["learning_rate"] == self.rate
        ]

    @property
    def whole(self) -> bool:
        """Whether all learning rates and seeds are there."""
        return set(self.validation) == set(tools.GRID) and len(self.scores) == len(tools.SEEDS)

    def of(self, tasks: Any) -> list[list[float]]:
        """The scores of tasks, (seeds, documents)."""
        return [pages.pooled(row, tasks) for row in self.scores]


def arms() -> dict[str, Arm]:
    """The arms that are whole."""
    found = pages.records("fisherlora")
    names = [*ARMS, *(f"{arm}_{part}" for part in FRACTIONS for arm in FRACTION_ARMS)]
    return {name: arm for name in names if (arm := Arm(name, found)).whole}


def build() -> list[pages.Claim]:
    """Write the page; the rows of the index."""
    found, trained = pages.records("fisherlora"), arms()
    if "uniform" not in trained:
        return []
    uniform = trained["uniform"]
    difference = {
        name: {
            kind: pages.interval(uniform.of(tasks), arm.of(tasks))
            for kind, tasks in (("accuracy", ACCURACY), ("loss", LOSS))
        }
        for name, arm in trained.items()
        if name != "uniform"
    }
    print(
        {name: {kind: pages.shown(one) for kind, one in rows.items()} for name, rows in difference.items()}, len(found)
    )
    return []


if __name__ == "__main__":
    build()
