"""The arms of the FisherLoRA study, from its records."""

from __future__ import annotations

from typing import Any

import pages
import tools
from fisherlora import ARMS, FRACTION_ARMS, FRACTIONS


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
