"""Summaries of spectra, and the costs of a rank.

The functions of spectra take singular values (*batch, r) in any order and reduce the last dimension. Half precision is
computed in float32, other dtypes in their own. Every function is defined for the zero spectrum. When ΔW is rescaled,
only `truncation_error`, `spectral_truncation_error` and `loss_gap_bound` change. Non-finite entries give NaN or a
meaningless rank: check data from files first, since nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _checked(singular_values: Tensor) -> Tensor:
    """The spectrum in float32 or better."""
    if singular_values.ndim == 0 or singular_values.shape[-1] == 0:
        raise ValueError(
            "`singular_values` must have r >= 1 entries in its last dimension; "
            f"got shape {tuple(singular_values.shape)}."
        )
    return singular_values.to(torch.promote_types(singular_values.dtype, torch.float32))


def _by_peak(singular_values: Tensor) -> tuple[Tensor, Tensor]:
    """The spectrum divided by its largest entry, so that squares and sums cannot overflow; and whether it is zero."""
    s = _checked(singular_values)
    peak = s.amax(-1, keepdim=True)
    zero = peak == 0
    return s / torch.where(zero, 1, peak), zero[..., 0]


def _checked_rank(rank: int, name: str = "rank", least: int = 0) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"`{name}` must be an integer; got {type(rank).__name__}.")
    if rank < least:
        raise ValueError(f"`{name}` must be at least {least}; got {rank}.")
    return rank


@torch.no_grad()
def effective_rank(singular_values: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """Exponential of the spectrum's entropy: in [1, r], and 0 for an all-zero spectrum.

    Raises: ValueError if the last dimension is absent or empty.
    References: Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
        >>> effective_rank(torch.tensor([[2.0, 2.0, 2.0], [5.0, 0.0, 0.0]]))
        tensor([3., 1.])
    """
    s, zero = _by_peak(singular_values)
    p = s / torch.where(zero[..., None], 1, s.sum(-1, keepdim=True))
    return torch.where(zero, 0, torch.special.entr(p).sum(-1).exp())


def spectral_entropy(singular_values: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """Entropy −Σ p ln p of p = σ / Σσ, in nats: in [0, ln r], and 0 for an all-zero spectrum.

    The logarithm of the effective rank. It has no derivative where a singular value is 0.
    Raises: ValueError if the last dimension is absent or empty.

    Example:
        >>> spectral_entropy(torch.tensor([1.0, 1.0])).exp()
        tensor(2.)
    """
    s, zero = _by_peak(singular_values)
    p = s / torch.where(zero[..., None], 1, s.sum(-1, keepdim=True))
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def capacity_utilization(
    singular_values: Float[Tensor, "*batch r"], rank: int | None = None
) -> Float[Tensor, "*batch"]:
    """Effective rank divided by `rank`, by default the number of singular values: in [0, 1].

    Give `rank` if it exceeds min(d_out, d_in), because there are fewer singular values then.
    Raises: ValueError if the last dimension is absent or empty, or `rank` is below 1; TypeError if it is no integer.
    References: LoRA-Lens, capacity utilization CU = r̂ / r.

    Example:
        >>> capacity_utilization(torch.tensor([1.0, 1.0]), rank=8)
        tensor(0.2500)
    """
    r = singular_values.shape[-1] if rank is None and singular_values.ndim else rank
    return effective_rank(singular_values) / _checked_rank(1 if r is None else r, least=1)


def stable_rank(singular_values: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """‖ΔW‖_F² / ‖ΔW‖_2²: in [1, r], and 0 for an all-zero spectrum.

    Raises: ValueError if the last dimension is absent or empty.
    References: Rudelson & Vershynin, "Sampling from large matrices", J. ACM 2007.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0]))
        tensor(1.2500)
    """
    s, _ = _by_peak(singular_values)
    return s.square().sum(-1)


def utilization(singular_values: Float[Tensor, "*batch r"], rank: int | None = None) -> Float[Tensor, "*batch"]:
    """Stable rank divided by `rank`, by default the number of singular values: in [0, 1].

    Raises: ValueError if the last dimension is absent or empty, or `rank` is below 1; TypeError if it is no integer.

    Example:
        >>> utilization(torch.tensor([2.0, 1.0]))
        tensor(0.6250)
    """
    r = singular_values.shape[-1] if rank is None and singular_values.ndim else rank
    return stable_rank(singular_values) / _checked_rank(1 if r is None else r, least=1)


def energy_curve(singular_values: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r"]:
    """C(k) = Σ_{i<=k} σ_i² / Σ σ² for k = 1 … r, σ descending: rises to 1; 0 for an all-zero spectrum.

    Raises: ValueError if the last dimension is absent or empty.

    Example:
        >>> energy_curve(torch.tensor([2.0, 1.0]))
        tensor([0.8000, 1.0000])
    """
    s, zero = _by_peak(singular_values)
    partial = s.sort(-1, descending=True).values.double().square().cumsum(-1)
    curve = partial / torch.where(zero[..., None], 1.0, partial[..., -1:])
    return curve.to(s.dtype)


@torch.no_grad()
def energy_rank(singular_values: Float[Tensor, "*batch r"], threshold: float) -> Int[Tensor, "*batch"]:
    """k@q, the smallest k with Σ_{i<=k} σ_i² >= q Σσ², where q is `threshold`; 0 for an all-zero spectrum.

    Computed in float64, with a slack of its rounding: zeros are never counted, and q = 1 does not count singular values
    whose squares vanish in float64.
    Raises: ValueError if the last dimension is absent or empty, or `threshold` is not in (0, 1].

    Example:
        >>> energy_rank(torch.tensor([2.0, 1.0, 0.1]), 0.9)
        tensor(2)
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be a share of the energy in (0, 1]; got {threshold}.")
    s, zero = _by_peak(singular_values)
    energy = s.double().sort(-1, descending=True).values.square()
    partial = energy.cumsum(-1)
    slack = energy.shape[-1] * torch.finfo(torch.float64).eps
    short = partial < threshold * (1 - slack) * partial[..., -1:]
    return torch.where(zero, 0, short.sum(-1) + 1)


def truncation_error(singular_values: Float[Tensor, "*batch r"], rank: int) -> Float[Tensor, "*batch"]:
    """Σ_{i>rank} σ_i²: the squared Frobenius error of the best approximation of rank `rank`.

    Raises: ValueError if the last dimension is absent or empty, or `rank` is negative; TypeError if it is no integer.
    References: Eckart & Young, Psychometrika 1936.

    Example:
        >>> truncation_error(torch.tensor([3.0, 2.0, 1.0]), 1)
        tensor(5.)
    """
    s = _checked(singular_values)
    tail = s.sort(-1, descending=True).values[..., _checked_rank(rank) :]
    return tail.double().square().sum(-1).to(s.dtype)


def spectral_truncation_error(singular_values: Float[Tensor, "*batch r"], rank: int) -> Float[Tensor, "*batch"]:
    """σ_{rank+1}: the spectral error of the best approximation of rank `rank`; 0 if there is no such σ.

    Raises: ValueError if the last dimension is absent or empty, or `rank` is negative; TypeError if it is no integer.
    References: Eckart & Young, Psychometrika 1936.

    Example:
        >>> spectral_truncation_error(torch.tensor([3.0, 2.0, 1.0]), 1)
        tensor(2.)
    """
    s = _checked(singular_values).sort(-1, descending=True).values
    return s[..., rank] if _checked_rank(rank) < s.shape[-1] else torch.zeros_like(s[..., 0])


def loss_gap_bound(singular_values: Float[Tensor, "*batch r"], rank: int, smoothness: float) -> Float[Tensor, "*batch"]:
    """(L/2) Σ_{i>rank} σ_i²: how much an L-smooth loss can rise if ΔW, at a stationary point, is truncated.

    `smoothness` is L. Raises: ValueError if the last dimension is absent or empty, `rank` is negative, or `smoothness`
    is negative or not finite.

    Example:
        >>> loss_gap_bound(torch.tensor([3.0, 2.0, 1.0]), rank=1, smoothness=0.2)
        tensor(0.5000)
    """
    if not 0 <= smoothness < math.inf:
        raise ValueError(f"`smoothness` must be finite and not negative; got {smoothness}.")
    return 0.5 * smoothness * truncation_error(singular_values, rank)


@torch.no_grad()
def knee(singular_values: Float[Tensor, "*batch r"]) -> Int[Tensor, "*batch"]:
    """How many singular values come before the spectrum's bend: k in [1, r], and 0 for an all-zero spectrum.

    The descending spectrum is scaled to run from (0, 1) to (1, 0). The bend is the point farthest below the chord
    between these ends. A spectrum without a point below the chord (flat, straight, bulging upwards, or r < 3) has no
    bend, and all its nonzero singular values count.
    Raises: ValueError if the last dimension is absent or empty.
    References: Satopää et al., "Finding a kneedle in a haystack", ICDCSW 2011.

    Example:
        >>> knee(torch.tensor([10.0, 9.0, 1.0, 0.5, 0.0]))
        tensor(2)
    """
    s, zero = _by_peak(singular_values)
    s = s.double().sort(-1, descending=True).values
    r = s.shape[-1]
    span = s[..., :1] - s[..., -1:]
    height = (s - s[..., -1:]) / torch.where(span == 0, 1.0, span)
    chord = torch.linspace(1, 0, r, dtype=s.dtype, device=s.device)
    distance = torch.where(span == 0, 0.0, chord - height)
    depth, bend = distance.max(-1)
    slack = 1e-6  # of float32 spectra
    return torch.where(zero, 0, torch.where(depth > slack, bend, (s > 0).sum(-1)))


def dominance(frobenius_norms: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Each ‖ΔW‖_F divided by their sum; all 0 if all norms are 0.

    Raises: ValueError if the last dimension is absent or empty.

    Example:
        >>> dominance(torch.tensor([3.0, 1.0]))
        tensor([0.7500, 0.2500])
    """
    if frobenius_norms.ndim == 0 or frobenius_norms.shape[-1] == 0:
        raise ValueError(f"`frobenius_norms` must have at least one entry; got shape {tuple(frobenius_norms.shape)}.")
    s, zero = _by_peak(frobenius_norms)
    return s / torch.where(zero[..., None], 1, s.sum(-1, keepdim=True))


def imbalance_ratio(sigma_a: Float[Tensor, "*batch"], sigma_b: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The larger of two largest singular values divided by the smaller: at least 1; inf if one is 0, 1 if both are.

    Example:
        >>> imbalance_ratio(torch.tensor(2.0), torch.tensor(6.0))
        tensor(3.)
    """
    dtype = torch.promote_types(torch.promote_types(sigma_a.dtype, sigma_b.dtype), torch.float32)
    a, b = sigma_a.to(dtype), sigma_b.to(dtype)
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return torch.where(high == low, 1.0, torch.where(low == 0, math.inf, high / torch.where(low == 0, 1.0, low)))


@dataclass(frozen=True)
class ScalingLaw:
    """effective rank = a · rank^beta, with R² of the logarithms."""

    a: float
    beta: float
    r_squared: float

    def __call__(self, rank: float) -> float:
        """The effective rank that the law predicts."""
        return float(self.a * rank**self.beta)


def _paired(x: Tensor | Sequence[float], y: Tensor | Sequence[float], names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    pair = torch.as_tensor(x, dtype=torch.float64).detach(), torch.as_tensor(y, dtype=torch.float64).detach()
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape or len(pair[0]) < 2:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must be one-dimensional, of the same length of at least 2; "
            f"got shapes {tuple(pair[0].shape)} and {tuple(pair[1].shape)}."
        )
    for name, values in zip(names, pair, strict=True):
        if not bool(values.isfinite().all()):
            raise ValueError(f"`{name}` must be finite; got NaN or infinite entries. Leave those pairs out.")
    return pair


def fit_scaling_law(ranks: Tensor | Sequence[float], effective_ranks: Tensor | Sequence[float]) -> ScalingLaw:
    """Least-squares fit of ln(effective rank) = ln a + beta ln(rank); R² is that of the logarithms.

    A constant effective rank counts as an exact fit, R² = 1. Reads its input, so it waits for the device.
    Raises: ValueError unless there are two or more pairs, all finite and positive, at two or more different ranks.

    Example:
        >>> law = fit_scaling_law([4, 8, 16], [2.0, 4.0, 8.0])
        >>> round(law.beta, 6), round(law(32), 6)
        (1.0, 16.0)
    """
    x, y = _paired(ranks, effective_ranks, ("ranks", "effective_ranks"))
    for name, values in (("ranks", x), ("effective_ranks", y)):
        if bool((values <= 0).any()):
            raise ValueError(f"`{name}` must be positive; got {float(values.min())}. Leave untrained modules out.")
    x, y = x.log(), y.log()
    dx, dy = x - x.mean(), y - y.mean()
    if bool((x == x[0]).all()):
        raise ValueError("`ranks` must have at least two different values; got one. Train at another rank.")
    beta = (dx * dy).sum() / dx.square().sum()
    residual = (dy - beta * dx).square().sum()
    total = dy.square().sum()
    constant = total <= len(y) * (torch.finfo(torch.float64).eps * (1 + y.abs().max())) ** 2
    r_squared = 1.0 if bool(constant) else float(1 - residual / total)
    return ScalingLaw(float((y.mean() - beta * x.mean()).exp()), float(beta), r_squared)


def pearson(x: Tensor | Sequence[float], y: Tensor | Sequence[float]) -> float:
    """Pearson correlation, in [−1, 1]. Reads its input, so it waits for the device.

    Raises: ValueError unless both have the same length of at least 2, are finite, and neither is constant.

    Example:
        >>> round(pearson([1, 2, 3], [2, 4, 7]), 4)
        0.9934
    """
    a, b = _paired(x, y, ("x", "y"))
    for name, values in (("x", a), ("y", b)):
        if bool((values == values[0]).all()):
            raise ValueError(
                f"`{name}` must not be constant: its correlation is undefined; got {float(values[0])} only."
            )
    a, b = (v / v.abs().max() for v in (a, b))  # squares may over- or underflow
    a, b = a - a.mean(), b - b.mean()
    a, b = a / a.abs().max(), b / b.abs().max()
    correlation = (a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(correlation.clamp(-1.0, 1.0))


def adapter_parameters(rank: int, d_out: int, d_in: int) -> int:
    """Parameters of a LoRA pair: r (d_in + d_out).

    Example:
        >>> adapter_parameters(16, d_out=4096, d_in=1024)
        81920
    """
    return _checked_rank(rank) * (_checked_rank(d_in, "d_in", 1) + _checked_rank(d_out, "d_out", 1))


def full_parameters(d_out: int, d_in: int) -> int:
    """Parameters of the layer's weight: d_in · d_out.

    Example:
        >>> full_parameters(d_out=4096, d_in=1024)
        4194304
    """
    return _checked_rank(d_in, "d_in", 1) * _checked_rank(d_out, "d_out", 1)


def parameter_ratio(rank: int, d_out: int, d_in: int) -> float:
    """Parameters of a LoRA pair divided by those of full fine-tuning; above 1 if the pair has more.

    Example:
        >>> parameter_ratio(16, d_out=4096, d_in=1024)
        0.01953125
    """
    return adapter_parameters(rank, d_out, d_in) / full_parameters(d_out, d_in)


def forward_multiply_adds(rank: int, d_out: int, d_in: int) -> int:
    """Multiply-adds per token that an unmerged LoRA pair adds to the forward pass: r (d_in + d_out).

    Example:
        >>> forward_multiply_adds(16, d_out=4096, d_in=1024)
        81920
    """
    return adapter_parameters(rank, d_out, d_in)
