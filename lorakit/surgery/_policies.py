"""Policies: pure functions from singular values and sensitivities to new singular values.

A policy is a frozen dataclass. It is called with one module's singular values σ (r,) of ΔW and its sensitivities g
(r,), both float64, divides g by its mean magnitude (or its 2-norm), and returns the edited σ (r,).

Reference: Tian et al., "Spectral Surgery", 2026, section 3.4. `DoubleSmooth`, `ZScore` and `RobustZ` are only in the
authors' code. The paper takes σ of B A without the scaling, and we take σ of ΔW; only the additive update differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

Aggregate = Literal["mean_abs", "mean", "abs_mean"]
Normalization = Literal["mean_abs", "l2", "none"]
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
ENERGIES = ("l1", "l2", "none")


@runtime_checkable
class Policy(Protocol):
    """What `reweight` calls; `aggregate` names the aggregate over examples that the policy works on."""

    @property
    def aggregate(self) -> Aggregate: ...

    def __call__(self, singular_values: Tensor, sensitivity: Tensor, *, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class _Base:
    normalization: Normalization = "mean_abs"

    @property
    def aggregate(self) -> Aggregate:
        return "mean_abs"

    def __post_init__(self) -> None:
        _require(self.normalization in get_args(Normalization), "normalization", "'mean_abs', 'l2' or 'none'", self)

    def _normalize(self, sensitivity: Tensor) -> Tensor:
        if self.normalization == "mean_abs":
            return sensitivity / sensitivity.abs().mean().clamp(min=torch.finfo(sensitivity.dtype).tiny)
        if self.normalization == "l2":
            return sensitivity / sensitivity.norm().clamp(min=torch.finfo(sensitivity.dtype).tiny)
        return sensitivity


@dataclass(frozen=True)
class _Gate(_Base):
    """A factor for each component: `amp` for the most sensitive, `sup` for the least sensitive, `mid` in between.

    `core_frac` and `noise_frac` are the shares of components that count as most and least sensitive.
    """

    core_frac: float = 0.2
    noise_frac: float = 0.2
    amp: float = 1.25
    sup: float = 0.80
    mid: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("core_frac", "noise_frac"):
            _require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", self)
        for name in ("amp", "sup", "mid"):
            _require(math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, "finite and >= 0", self)

    def __call__(self, singular_values: Tensor, sensitivity: Tensor, *, generator: torch.Generator) -> Tensor:
        return singular_values * self.gate(self._normalize(sensitivity).abs(), generator)

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The factors (r,) for normalized magnitudes x (r,)."""
        raise NotImplementedError

    def _counts(self, r: int) -> tuple[int, int]:
        core = min(max(round(self.core_frac * r), 1), r)
        return core, max(0, min(round(self.noise_frac * r), r - core))

    def _three_levels(self, order: Tensor) -> Tensor:
        """`amp` for the first components in `order`, `sup` for the last, `mid` for the others."""
        core, noise = self._counts(order.shape[0])
        gate = torch.full(order.shape, self.mid, dtype=torch.float64)
        gate[order[:core]] = self.amp
        gate[order[order.shape[0] - noise :]] = self.sup
        return gate

    def _two_sided(self, x: Tensor, low: float | Tensor, high: float | Tensor, tau: float | Tensor) -> Tensor:
        falls = (self.mid - self.sup) * torch.sigmoid((low - x) / tau)
        rises = (self.amp - self.mid) * torch.sigmoid((x - high) / tau)
        return self.mid - falls + rises

    def _thresholds(self, x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The noise and core quantiles of x; the quantiles `low` and `high` if the fractions make those cross."""
        q_low, q_high = self.noise_frac, 1 - self.core_frac
        if q_low >= q_high:
            q_low, q_high = low, high
        return torch.quantile(x, q_low), torch.quantile(x, q_high)


@dataclass(frozen=True)
class AbsSelect(_Gate):
    """Hard selection: the largest |g| get `amp` (at least one component), the smallest get `sup`."""

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._three_levels(torch.argsort(x, descending=True, stable=True))


@dataclass(frozen=True)
class RandomIndex(_Gate):
    """The control: as many components as `AbsSelect` selects get the same factors, but at random."""

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._three_levels(torch.randperm(x.shape[0], generator=generator))


@dataclass(frozen=True)
class SmoothAbs(_Gate):
    """Continuous reweighting: a sigmoid in |g| from `sup` to `amp`, equal to `mid` at the center quantile (Eq. 6)."""

    temperature: float = 0.35
    center_quantile: float = 0.5
    align_mid: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.temperature > 0, "temperature", "> 0", self)
        _require(0 <= self.center_quantile <= 1, "center_quantile", "in [0, 1]", self)
        if self.align_mid:
            _require(self.sup < self.mid < self.amp, "mid", "between `sup` and `amp` with align_mid=True", self)

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if x.max() - x.min() < 1e-12:
            return torch.full_like(x, self.mid)
        low, high = self._thresholds(x, 0.25, 0.75)
        tau = self.temperature * (high - low).clamp(min=1e-8)
        center = torch.quantile(x, self.center_quantile)
        offset = 0.0
        if self.align_mid:
            height = (self.mid - self.sup) / (self.amp - self.sup)
            offset = math.log(height / (1 - height))
        return self.sup + (self.amp - self.sup) * torch.sigmoid((x - center) / tau + offset)


@dataclass(frozen=True)
class DoubleSmooth(_Gate):
    """Two sigmoids in |g|: one falls to `sup` below the noise quantile, one rises to `amp` above the core quantile."""

    temperature: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.temperature > 0, "temperature", "> 0", self)

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        low, high = self._thresholds(x, 0.45, 0.55)
        tau = self.temperature * (x.max() - x.min()).clamp(min=1e-8)
        return self._two_sided(x, low, high, tau)


@dataclass(frozen=True)
class _Standardized(_Gate):
    high: float = 1.0
    low: float = -0.5
    tau: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.tau > 0, "tau", "> 0", self)
        _require(self.low <= self.high, "low", "at most `high`", self)


@dataclass(frozen=True)
class ZScore(_Standardized):
    """`DoubleSmooth` on the standard scores of |g|, with fixed thresholds; no edit if |g| hardly varies."""

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        std = x.std(correction=0)
        z = (x - x.mean()) / std.clamp(min=1e-8)
        if std < 1e-6 or z.abs().max() < 1e-3:
            return torch.ones_like(x)
        return self._two_sided(z, self.low, self.high, self.tau)


@dataclass(frozen=True)
class RobustZ(_Standardized):
    """`ZScore` with the (lower) median as mean, and 1.4826 × the median absolute deviation as deviation."""

    def gate(self, x: Tensor, generator: torch.Generator) -> Tensor:
        median = x.median()
        deviation = (x - median).abs().median() * 1.4826
        if deviation < 1e-6:
            return torch.ones_like(x)
        return self._two_sided((x - median) / deviation, self.low, self.high, self.tau)


@dataclass(frozen=True)
class GradDirection(_Base):
    """A step against the signed gradient (Eq. 7): σ′ = σ · exp(−step), or σ − step with update="additive".

    `asymmetric`: step = `eta_suppress` · relu(g)^`power` − `eta_enhance` · relu(−g); otherwise step = `eta` · g.
    """

    eta_suppress: float = 2.0
    eta_enhance: float = 0.2
    power: float = 1.0
    asymmetric: bool = True
    eta: float = 0.2
    update: Literal["multiplicative", "additive"] = "multiplicative"

    @property
    def aggregate(self) -> Aggregate:
        return "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eta_suppress", "eta_enhance", "eta"):
            _require(math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, "finite and >= 0", self)
        _require(self.power > 0, "power", "> 0", self)
        _require(self.update in ("multiplicative", "additive"), "update", "'multiplicative' or 'additive'", self)

    def __call__(self, singular_values: Tensor, sensitivity: Tensor, *, generator: torch.Generator) -> Tensor:
        g = self._normalize(sensitivity)
        step = self.eta * g
        if self.asymmetric:
            step = self.eta_suppress * torch.relu(g) ** self.power - self.eta_enhance * torch.relu(-g)
        return singular_values - step if self.update == "additive" else singular_values * torch.exp(-step)


POLICIES: dict[str, Callable[[], Policy]] = {
    "abs_select": AbsSelect,
    "smooth_abs": SmoothAbs,
    "random_index": RandomIndex,
    "grad_direction": GradDirection,
    "double_smooth": DoubleSmooth,
    "z_score": ZScore,
    "robust_z": RobustZ,
}


def resolve_policy(policy: str | Policy) -> Policy:
    """The policy of a name, with its defaults; a policy object is returned as it is.

    Raises: ValueError for an unknown name; TypeError for anything else that is not a policy.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}, or a policy object; got {policy!r}.")
        return POLICIES[policy]()
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise TypeError(
            f"`policy` must be a name or an object such as AbsSelect(core_frac=0.3), with an `aggregate` and callable "
            f"with (singular_values, sensitivity, generator=...); got {policy!r}."
        )
    return policy


def preserve(edited: Tensor, original: Tensor, energy: str) -> Tensor:
    """`edited`, clamped at 0, rescaled to the sum (l1, the nuclear norm) or 2-norm (l2) of `original`, or unscaled."""
    edited = edited.clamp(min=0)
    if energy == "none":
        return edited
    order = 1 if energy == "l1" else 2
    now, before = torch.linalg.vector_norm(edited, order), torch.linalg.vector_norm(original, order)
    return edited * (before / now) if now > 0 else edited


def _require(holds: bool, name: str, what: str, owner: object) -> None:
    if not holds:
        raise ValueError(f"`{name}` of {type(owner).__name__} must be {what}; got {getattr(owner, name)!r}.")
