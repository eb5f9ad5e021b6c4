"""What a Fisher probe reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lorakit._figures import new_figure
from lorakit.naming.roles import ROLES, Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, or what follows from such means, and its standard error; None for a single example."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class FisherRow:
    """One module. `fisher` is the mean of F over the d_out · rank entries of its lora_B; `params` are its adapter's
    parameters, rank · (d_in + d_out).

    `factor_a` and `weight` are the same for the entries of lora_A and of the dense weight, None unless asked for.
    """

    module_name: str
    role: Role | None
    layer: int | None
    d_out: int
    d_in: int
    rank: int
    scaling: float
    params: int
    fisher: float
    stderr: float | None
    factor_a: Estimate | None
    weight: Estimate | None


@dataclass(frozen=True, eq=False)
class Moments:
    """What stays in memory of a module: `per_example` (n,), the mean squared gradient of lora_B's entries for each
    example; and of the dense weight, where asked for, `weight_rows` (d_out,) Σ_j F_oj and `weight_columns` (d_in,)
    Σ_o F_oj. All float64, on the CPU."""

    per_example: Tensor
    weight_rows: Tensor | None
    weight_columns: Tensor | None


@dataclass(frozen=True)
class FisherGroup:
    """Modules of one role or layer together: the mean over all the entries of their lora_B."""

    role: Role | None
    layer: int | None
    modules: int
    params: int
    fisher: float
    stderr: float | None


@dataclass(frozen=True)
class FisherReport:
    """The Fisher information of an adapter's modules, over `num_examples` examples.

    `num_without_labels` more had no label that enters the loss and were left out. `temporary` says that the adapter was
    attached for the probe alone, and after how many `train_steps`. `target_modules` names what was probed, as a config
    takes it. `unprobed` are modules of the adapter that are no linear ones. `moments` holds what is not in `to_dict`.
    """

    modules: tuple[FisherRow, ...]
    target_modules: tuple[str, ...]
    num_examples: int
    num_without_labels: int
    temporary: bool
    train_steps: int
    seed: int
    unprobed: tuple[str, ...]
    moments: dict[str, Moments]

    @property
    def roles(self) -> tuple[FisherGroup, ...]:
        """One group for each role, the modules that have none together at the end."""
        present = [role for role in (*ROLES, None) if any(row.role == role for row in self.modules)]
        return tuple(self._group([row for row in self.modules if row.role == role], role, None) for role in present)

    @property
    def layers(self) -> tuple[FisherGroup, ...]:
        """One group for each layer, by its index, the modules that lie in none together at the end."""
        present = sorted({row.layer for row in self.modules}, key=lambda layer: (layer is None, layer))
        return tuple(self._group([row for row in self.modules if row.layer == i], None, i) for i in present)

    @property
    def vq_ratio(self) -> Estimate | None:
        """Mean F over the value projections' lora_B entries over that of the query projections, with its standard error
        (first order, examples paired); None where one of them is missing or the queries' is 0."""
        value, query = (
            self._per_example([row for row in self.modules if row.role == role]) for role in ("value", "query")
        )
        if value is None or query is None or not query.any():
            return None
        ratio = float(value.mean() / query.mean())
        return Estimate(ratio, standard_error((value - ratio * query) / query.mean()))

    def _per_example(self, rows: Sequence[FisherRow]) -> Tensor | None:
        """For each example, the mean squared gradient over all the rows' lora_B entries."""
        if not rows:
            return None
        entries = torch.tensor([row.d_out * row.rank for row in rows], dtype=torch.float64)
        stacked = torch.stack([self.moments[row.module_name].per_example for row in rows])
        return entries @ stacked / entries.sum()

    def _group(self, rows: Sequence[FisherRow], role: Role | None, layer: int | None) -> FisherGroup:
        values = cast(Tensor, self._per_example(rows))
        params = sum(row.params for row in rows)
        return FisherGroup(role, layer, len(rows), params, float(values.mean()), standard_error(values))

    def to_dict(self) -> dict[str, Any]:
        """All but the moments, as plain lists, numbers and strings that JSON takes."""
        ratio = self.vq_ratio
        return {
            "num_examples": self.num_examples,
            "num_without_labels": self.num_without_labels,
            "temporary": self.temporary,
            "train_steps": self.train_steps,
            "seed": self.seed,
            "target_modules": list(self.target_modules),
            "unprobed": list(self.unprobed),
            "vq_ratio": None if ratio is None else {"value": ratio.value, "stderr": ratio.stderr},
            "roles": [{k: v for k, v in vars(group).items() if k != "layer"} for group in self.roles],
            "layers": [{k: v for k, v in vars(group).items() if k != "role"} for group in self.layers],
            "modules": [_plain(row) for row in self.modules],
        }

    def plot(self) -> Figure:
        """F by layer, one line a role, with standard errors, on a logarithmic axis.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        for role in dict.fromkeys(row.role for row in self.modules):
            rows = [row for row in self.modules if row.role == role and row.fisher > 0]
            places = [i if row.layer is None else row.layer for i, row in enumerate(rows)]
            errors = [row.stderr or 0.0 for row in rows]
            axes.errorbar(places, [row.fisher for row in rows], yerr=errors, fmt="o-", ms=4, capsize=2, label=str(role))
        axes.set_yscale("log")
        ratio = self.vq_ratio
        title = f"Fisher information of lora_B, {self.num_examples} examples"
        axes.set(xlabel="layer", ylabel="mean squared gradient of an entry")
        axes.set_title(title if ratio is None else f"{title}; V/Q = {ratio.value:.3g}")
        axes.legend()
        return figure


def estimate(per_example: Tensor) -> Estimate:
    return Estimate(float(per_example.mean()), standard_error(per_example))


def standard_error(per_example: Tensor) -> float | None:
    n = per_example.shape[0]
    return float(per_example.std() / math.sqrt(n)) if n > 1 else None


def _plain(row: FisherRow) -> dict[str, Any]:
    return {key: vars(value) if isinstance(value, Estimate) else value for key, value in vars(row).items()}
