"""From a probe's report to ranks or ks under a budget; a report is anything that has what the protocols say."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Protocol, TypeVar

from lorakit._checks import check_integer
from lorakit.allocation.masks import MaskAllocation, allocate_masks
from lorakit.allocation.report import Allocation, Per, Rule
from lorakit.allocation.rules import allocate
from lorakit.errors import AllocationError

# Covariant, so that a report whose rows have more than the protocol asks for fits it.
Row = TypeVar("Row", covariant=True)


class Probed(Protocol[Row]):
    """A report about probed modules."""

    @property
    def modules(self) -> Sequence[Row]: ...
    @property
    def target_modules(self) -> Sequence[str]: ...


class ProbedModule(Protocol):
    """What an allocation of ranks needs to know about one probed module."""

    @property
    def module_name(self) -> str: ...
    @property
    def role(self) -> str | None: ...
    @property
    def d_out(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def fisher(self) -> float: ...


class ProbeReport(Probed[ProbedModule], Protocol):
    """The part of a probe's report that an allocation of ranks needs; `lorakit.fisher.FisherReport` has it."""

    @property
    def vq_interval(self) -> tuple[float, float] | None: ...


class ProbedMaskStep(Protocol):
    """The sensitivity S(k) of a mask of size k."""

    @property
    def k(self) -> int: ...
    @property
    def sensitivity(self) -> float: ...


class ProbedMask(Protocol):
    """What an allocation of ks needs to know about one probed module."""

    @property
    def module_name(self) -> str: ...
    @property
    def role(self) -> str | None: ...
    @property
    def d_out(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def mask(self) -> Sequence[ProbedMaskStep]: ...


class MaskProbeReport(Probed[ProbedMask], Protocol):
    """The part of a probe's report that an allocation of ks needs; `lorakit.fisher.FisherReport` has it."""

    @property
    def mode(self) -> str | None: ...


def ranks_from_probe(
    report: ProbeReport,
    *,
    budget: float | None = None,
    params: int | None = None,
    rule: Rule | None = None,
    r: int = 16,
    min_rank: int = 1,
    max_rank: int | None = None,
    per: Per = "module",
) -> Allocation:
    """Ranks for the modules that a probe measured; `FisherLoRAConfig.from_probe` has the same arguments and errors.

    Warns if the rule is "fisherlora" and the interval of the V/Q ratio does not lie above 1.
    """
    check_integer("r", r)
    if rule == "energy":
        raise AllocationError(
            "`rule` 'energy' needs the spectra of a trained adapter, which a probe does not have. Use 'fisher'."
        )
    rule = rule or default_rule(report)
    costs = {row.module_name: row.d_out + row.d_in for row in report.modules}
    amount = _amount(budget, params, 0.625, r * sum(costs.values()), f"rank {r}")
    whole = {row.module_name: min(row.d_out, row.d_in) for row in report.modules}
    by_role = rule in ("fisherlora", "spectral", "uniform")
    bound = (r if by_role else 2 * r) if max_rank is None else max_rank
    found = allocate(
        {row.module_name: row.fisher for row in report.modules},
        costs,
        amount,
        rule=rule,
        min_rank=min_rank,
        max_rank={name: min(bound, largest) for name, largest in whole.items()},
        per=per,
        roles={row.module_name: row.role for row in report.modules},
        d_out={row.module_name: row.d_out for row in report.modules},
    )
    if rule == "fisherlora":
        _warn_of_ratio(report.vq_interval)
    return found


def default_rule(report: Probed[ProbedModule]) -> Rule:
    """The paper's rule, "fisherlora", where query and value projections were probed; else "fisher"."""
    return "fisherlora" if {"query", "value"} <= {row.role for row in report.modules} else "fisher"


def _warn_of_ratio(interval: tuple[float, float] | None) -> None:
    if interval is None:
        found = "has no interval here (one example, or queries without a gradient)"
    elif interval[0] <= 1:
        found = f"has the 90 % interval {interval[0]:.3g} to {interval[1]:.3g} here, which is not above 1"
    else:
        return
    warnings.warn(
        f"The rule 'fisherlora' gives value projections the higher rank because the loss is more sensitive to them, "
        f"but the V/Q ratio {found}. Probe more examples, or use rule='uniform'.",
        stacklevel=3,
    )


def masks_from_probe(
    report: MaskProbeReport, *, budget: float | None = None, params: int | None = None, k: int = 200
) -> MaskAllocation:
    """The ks for the modules that a probe measured; `SpecLoRAConfig.from_probe` has the same arguments and errors."""
    check_integer("k", k)
    if report.mode is None:
        raise AllocationError("`report` must have measured masks; got one that has not. Probe with method='speclora'.")
    uniform = sum(min(k, row.d_out, row.d_in) for row in report.modules)
    return allocate_masks(
        {row.module_name: {step.k: step.sensitivity for step in row.mask} for row in report.modules},
        _amount(budget, params, 1.0, uniform, f"k = {k}"),
        roles={row.module_name: row.role for row in report.modules},
        limits={row.module_name: min(row.d_out, row.d_in) for row in report.modules},
    )


def _amount(budget: float | None, params: int | None, default: float, uniform: int, what: str) -> int:
    """The budget as a number of parameters, from a number or from a fraction of what `uniform` stands for."""
    if budget is not None and params is not None:
        raise ValueError(
            f"`budget` (a fraction) and `params` (a number of parameters) exclude each other; got {budget!r} and "
            f"{params!r}. Pass one of them."
        )
    if params is not None:
        return params
    budget = default if budget is None else budget
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ValueError(
            f"`budget` must be a fraction in (0, 1] of uniform {what}; got {budget!r}. Use `params` for a number of "
            f"parameters."
        )
    return math.floor(budget * uniform + 1e-6)
