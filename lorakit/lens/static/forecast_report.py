"""What a comparison says of a merge before it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit._report import Table
from lorakit.merging._combine import Method

SIMILAR = 0.01  # strengths closer than this count as equal: the method that is named first is recommended


@dataclass(frozen=True)
class MethodForecast:
    """What is left of two adapters in their merge M by one method.

    With all modules of an update as one vector, and M at the rank as it would be written (`merge`'s defaults):

    * `strength_a` = ⟨M, ΔW_a⟩ / ‖ΔW_a‖²: how strongly ΔW_a is still applied, the coefficient of M regressed on ΔW_a.
      1: as by itself; above 1: more than that; 0: not; negative: its opposite. For linear it is
      w_a + w_b ⟨ΔW_b, ΔW_a⟩ / ‖ΔW_a‖².
    * `energy_a` = ‖P_a M‖² / ‖ΔW_a‖² = strength_a², with P_a the projection onto the line of ΔW_a.
    * `directions_a`: the share of ΔW_a's leading directions that M's column and row spaces hold:
      ½ (‖U_Mᵀ U_a‖² / k + ‖V_Mᵀ V_a‖² / k), the mean cos² of the principal angles where M has at least k directions,
      k as in the comparison; mean over modules.
    * `dominance_a` = |strength_a| ‖ΔW_a‖ / (|strength_a| ‖ΔW_a‖ + |strength_b| ‖ΔW_b‖): A's part of the merge.

    None where an update is 0. `rank` is the highest of M's modules; `norm` is ‖M‖_F.
    """

    method: Method
    density: float | None
    seed: int | None
    rank: int
    norm: float
    strength_a: float | None
    strength_b: float | None
    energy_a: float | None
    energy_b: float | None
    directions_a: float | None
    directions_b: float | None
    dominance_a: float | None

    @property
    def weaker(self) -> float:
        """The smaller of the two strengths; 0 where one is None."""
        return min(self.strength_a or 0.0, self.strength_b or 0.0)


@dataclass(frozen=True)
class MergeForecast:
    """What is left of two adapters in their merge with these `weights`, by each method that was asked for."""

    weights: tuple[float, float]
    methods: tuple[MethodForecast, ...]

    @property
    def recommended(self) -> MethodForecast:
        """The method by which the weaker adapter is strongest; of methods within 0.01 the one that is named first."""
        best = max(one.weaker for one in self.methods)
        return next(one for one in self.methods if one.weaker >= best - SIMILAR)

    def summary(self) -> dict[str, Any]:
        """More of the JSON summary than the fields."""
        return {"recommended": self.recommended.method}

    def table(self) -> Table:
        """One row a method."""

        def value(name: str, form: str) -> Callable[[MethodForecast], str]:
            return lambda one: "-" if (x := getattr(one, name)) is None else format(x, form)

        columns: list[tuple[str, Callable[[MethodForecast], str]]] = [
            ("method", lambda one: one.method),
            ("rank", value("rank", "d")),
            ("A's strength", value("strength_a", ".3f")),
            ("B's", value("strength_b", ".3f")),
            ("A's energy", value("energy_a", ".3f")),
            ("B's", value("energy_b", ".3f")),
            ("A's directions", value("directions_a", ".3f")),
            ("B's", value("directions_b", ".3f")),
            ("A's part", value("dominance_a", ".3f")),
        ]
        weights = ", ".join(f"{weight:.4g}" for weight in self.weights)
        note = (
            "How strongly each update is still applied in the merge (1: as by itself), its energy and its directions "
            "that are left, and A's part of the two."
        )
        return Table.of(f"Forecast of the merge with weights {weights}", columns, self.methods, note=note)
