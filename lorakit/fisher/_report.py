"""The report of a Fisher probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import einsum
from scipy import special
from torch import Tensor

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import number
from lorakit._report import Report
from lorakit.naming.roles import ROLES, Role
from lorakit.tuners._mask import Mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, or a function of such means, and its standard error (None for a single example)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class MaskStep:
    """S(k) = Σ_{i≤k} E[(∂ℓ/∂d_i)²] of a mask of size k in one module, and its standard error (None for one example)."""

    k: int
    sensitivity: float
    stderr: float | None


@dataclass(frozen=True)
class FisherRow:
    """One module. `fisher` is the mean of F over the d_out · rank entries of lora_B, with its standard error.

    `params` counts the adapter's parameters, rank · (d_in + d_out). `factor_a` and `weight` are the mean of F over the
    entries of lora_A and of the dense weight; None unless asked for. `mask` has S(k) for each k of the ladder; empty
    unless asked for. S may fall from one k to the next, since a row's new columns may act against its first ones.
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
    mask: tuple[MaskStep, ...] = ()


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of a module that stay in memory, in float64 on the CPU.

    `per_example` (n,) is the mean squared gradient of lora_B's entries for each example. `weight_rows` (d_out,) is
    Σ_j F_oj and `weight_columns` (d_in,) is Σ_o F_oj of the dense weight; None unless asked for.
    """

    per_example: Tensor
    weight_rows: Tensor | None
    weight_columns: Tensor | None


@dataclass(frozen=True)
class FisherGroup:
    """The modules of one role or layer: `fisher` is the mean of F over all entries of their lora_B."""

    role: Role | None
    layer: int | None
    modules: int
    params: int
    fisher: float
    stderr: float | None


@dataclass(frozen=True, repr=False)
class FisherReport(Report):
    """The Fisher information of an adapter's modules.

    `num_examples` were used; `num_without_labels` more had no label that counts and were left out. `temporary` says
    that the LoRA was made for the probe alone and trained for `train_steps`. `target_modules` names the probed modules
    as a config takes them. `mode` is that of the masks, None if none were measured. `unprobed` are modules of the
    adapter that are not linear. `moments`, by module, is not in `to_dict`.
    """

    model_name: str
    modules: tuple[FisherRow, ...]
    target_modules: tuple[str, ...]
    num_examples: int
    num_without_labels: int
    temporary: bool
    train_steps: int
    seed: int
    mode: Mode | None
    unprobed: tuple[str, ...]
    moments: dict[str, Moments]

    @property
    def headline(self) -> str:
        """How many modules, how many examples, and the ratio of values to queries."""
        ratio = self.vq_ratio
        text = f"{self.model_name}: {len(self.modules)} modules, {self.num_examples} examples"
        if ratio is None:
            return text
        error = "" if ratio.stderr is None else f" ± {number(ratio.stderr)}"
        return f"{text}, V/Q ratio {number(ratio.value)}{error}"

    @property
    def details(self) -> tuple[str, ...]:
        """Mean F by role, the largest first, and what was left out."""
        groups = sorted(self.roles, key=lambda group: group.fisher, reverse=True)
        lines = ["mean F by role: " + ", ".join(f"{_label(group.role)} {number(group.fisher)}" for group in groups)]
        if self.num_without_labels:
            lines.append(f"{self.num_without_labels} examples without labels were left out")
        if self.unprobed:
            lines.append(f"{len(self.unprobed)} modules are not linear and were not probed")
        return tuple(lines)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Python code that turns the report into a config with a budget of 62.5 % of uniform ranks' parameters.

        With masks, into one whose ks have the sum of a uniform k.
        """
        ranks = "import lorakit; config = lorakit.FisherLoRAConfig.from_probe(report, budget=0.625)"
        masks = "import lorakit; config = lorakit.SpecLoRAConfig.from_probe(report, k=200)"
        return (ranks,) if self.mode is None else (masks, ranks)

    @property
    def roles(self) -> tuple[FisherGroup, ...]:
        """One group for each role; modules without a role come last, as one group."""
        present = [role for role in (*ROLES, None) if any(row.role == role for row in self.modules)]
        return tuple(self._group([row for row in self.modules if row.role == role], role, None) for role in present)

    @property
    def layers(self) -> tuple[FisherGroup, ...]:
        """One group for each layer, by index; modules outside of layers come last, as one group."""
        present = sorted({row.layer for row in self.modules}, key=lambda layer: (layer is None, layer))
        return tuple(self._group([row for row in self.modules if row.layer == i], None, i) for i in present)

    @property
    def vq_ratio(self) -> Estimate | None:
        """Mean F of the value projections' lora_B entries divided by that of the query projections'.

        The standard error is of first order, with examples paired. None if either role is missing, or if the queries'
        mean is 0.
        """
        value, query = (
            self._per_example([row for row in self.modules if row.role == role]) for role in ("value", "query")
        )
        if value is None or query is None or not query.any():
            return None
        ratio = float(value.mean() / query.mean())
        return Estimate(ratio, standard_error((value - ratio * query) / query.mean()))

    @property
    def vq_interval(self) -> tuple[float, float] | None:
        """The 90 % interval of `vq_ratio`: a t interval of its logarithm, each bound at 5 %.

        None if there is no ratio, if it is 0, or for a single example.
        """
        ratio = self.vq_ratio
        if ratio is None or ratio.stderr is None or ratio.value == 0:
            return None
        width = float(special.stdtrit(self.num_examples - 1, 0.95)) * ratio.stderr / ratio.value
        return ratio.value * math.exp(-width), ratio.value * math.exp(width)

    def _per_example(self, rows: Sequence[FisherRow]) -> Tensor | None:
        """For each example, the mean squared gradient over the lora_B entries of all rows, (n,)."""
        if not rows:
            return None
        entries = torch.tensor([row.d_out * row.rank for row in rows], dtype=torch.float64)
        stacked = torch.stack([self.moments[row.module_name].per_example for row in rows])
        return einsum(entries, stacked, "module, module n -> n") / entries.sum()

    def _group(self, rows: Sequence[FisherRow], role: Role | None, layer: int | None) -> FisherGroup:
        values = cast(Tensor, self._per_example(rows))
        params = sum(row.params for row in rows)
        return FisherGroup(role, layer, len(rows), params, float(values.mean()), standard_error(values))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the moments, as JSON data."""
        ratio = self.vq_ratio
        return {
            "model_name": self.model_name,
            "num_examples": self.num_examples,
            "num_without_labels": self.num_without_labels,
            "temporary": self.temporary,
            "train_steps": self.train_steps,
            "seed": self.seed,
            "mode": self.mode,
            "target_modules": list(self.target_modules),
            "unprobed": list(self.unprobed),
            "vq_ratio": None if ratio is None else {"value": ratio.value, "stderr": ratio.stderr},
            "roles": [{k: v for k, v in vars(group).items() if k != "layer"} for group in self.roles],
            "layers": [{k: v for k, v in vars(group).items() if k != "role"} for group in self.layers],
            "modules": [_row_data(row) for row in self.modules],
        }

    def plot(self) -> Figure:
        """Mean F by layer with standard errors, with one panel for each role and one logarithmic axis for all."""
        roles = [group.role for group in self.roles]
        columns = min(len(roles), 4)
        lines = math.ceil(len(roles) / columns)
        figure = new_figure(2.0 + 2.2 * max(columns, 3), 1.4 + 2.2 * lines)
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, role in zip(panels, roles, strict=False):
            rows = [row for row in self.modules if row.role == role and row.fisher > 0]
            places = [i if row.layer is None else row.layer for i, row in enumerate(rows)]
            errors = [row.stderr or 0.0 for row in rows]
            axes.errorbar(places, [row.fisher for row in rows], yerr=errors, fmt="o-", ms=3, capsize=2)
            axes.set_title(_label(role))
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        for axes in panels[len(roles) :]:
            axes.set_axis_off()
        figure.suptitle(escape_mathtext(f"Fisher information of lora_B\n{self.headline}"))
        figure.supxlabel("layer")
        figure.supylabel("mean squared gradient of an entry")
        return figure


def estimate(per_example: Tensor) -> Estimate:
    """The mean of values (n,) and its standard error."""
    return Estimate(float(per_example.mean()), standard_error(per_example))


def standard_error(per_example: Tensor) -> float | None:
    """The standard error of the mean of values (n,); None for a single one."""
    n = per_example.shape[0]
    return float(per_example.std() / math.sqrt(n)) if n > 1 else None


def _row_data(row: FisherRow) -> dict[str, Any]:
    data = {key: vars(value) if isinstance(value, Estimate) else value for key, value in vars(row).items()}
    return data | {"mask": [vars(step) for step in row.mask]}


def _label(role: Role | None) -> str:
    return role or "other"
