"""Similarity of two updates' subspaces and directions, and its values for random updates.

A basis is a tensor (*batch, d, k) with orthonormal columns, such as U or Vh.mT from `LowRank.svd`. Orthonormality is
not checked, so that nothing waits for the device. Half precision is computed in float32, and batches broadcast.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.spectral._product import by_peak, widened
from lorakit.spectral.lowrank import LowRank

if TYPE_CHECKING:
    from jaxtyping import Float


def _bases(first: Tensor, second: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    for name, basis in zip(names, (first, second), strict=True):
        if not isinstance(basis, Tensor) or not basis.is_floating_point():
            came = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
            raise TypeError(f"`{name}` must be a real floating-point tensor; got {came}.")
        if basis.ndim < 2 or basis.shape[-1] == 0:
            raise ValueError(f"`{name}` must have shape (*batch, d, k) with k >= 1; got {tuple(basis.shape)}.")
    if first.shape[-2] != second.shape[-2]:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must lie in the same space, with equal d; "
            f"got {first.shape[-2]} and {second.shape[-2]}. Is one of them transposed?"
        )
    dtype = widened(torch.promote_types(first.dtype, second.dtype))
    return first.to(dtype), second.to(dtype)


def principal_cosines(
    Q_a: Float[Tensor, "*batch d k_a"], Q_b: Float[Tensor, "*batch d k_b"]
) -> Float[Tensor, "*batch k"]:
    """Cosines of the k = min(k_a, k_b) principal angles between two subspaces, descending, in [0, 1].

    Raises: ValueError if a basis is empty or the dimensions d differ; TypeError unless both are floating-point.
    References: Björck & Golub, "Numerical methods for computing angles between linear subspaces", 1973.

    Example:
        >>> a, b = torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]
        >>> principal_cosines(a, b)
        tensor([1., 0.])
    """
    a, b = _bases(Q_a, Q_b, ("Q_a", "Q_b"))
    cosines: Tensor = torch.linalg.svdvals(a.mT @ b)
    return cosines.clamp(0.0, 1.0)


def principal_angles(
    Q_a: Float[Tensor, "*batch d k_a"], Q_b: Float[Tensor, "*batch d k_b"]
) -> Float[Tensor, "*batch k"]:
    """The k = min(k_a, k_b) principal angles between two subspaces, in radians, ascending, in [0, π/2].

    Angles below π/4 are computed from their sines, because a cosine near 1 cannot resolve them.
    Raises: as `principal_cosines`. References: Björck & Golub 1973; Knyazev & Argentati 2002.

    Example:
        >>> a, b = torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]
        >>> principal_angles(a, b) / torch.pi
        tensor([0.0000, 0.5000])
    """
    a, b = _bases(Q_a, Q_b, ("Q_a", "Q_b"))
    if a.shape[-1] < b.shape[-1]:
        a, b = b, a
    cosines = torch.linalg.svdvals(a.mT @ b).clamp(0.0, 1.0)
    outside = b - a @ (a.mT @ b)  # (d, k): its singular values are the sines, without some zeros if d < k
    sines = torch.linalg.svdvals(outside)
    sines = torch.nn.functional.pad(sines, (0, b.shape[-1] - sines.shape[-1])).flip(-1).clamp(0.0, 1.0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def subspace_overlap(Q_a: Float[Tensor, "*batch d k_a"], Q_b: Float[Tensor, "*batch d k_b"]) -> Float[Tensor, "*batch"]:
    """Mean squared cosine of the min(k_a, k_b) principal angles: 1 if one subspace contains the other, 0 if orthogonal.

    `random_subspace_overlap` is its value for random subspaces. Raises: as `principal_cosines`.

    Example:
        >>> a, b = torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]
        >>> subspace_overlap(a, b)
        tensor(0.5000)
    """
    a, b = _bases(Q_a, Q_b, ("Q_a", "Q_b"))
    least = min(a.shape[-1], b.shape[-1])
    return ((a.mT @ b).square().sum((-2, -1)) / least).clamp(0.0, 1.0)


def random_subspace_overlap(d: int, k_a: int, k_b: int) -> float:
    """Expected `subspace_overlap` of two independent, uniformly random subspaces: max(k_a, k_b) / d.

    Raises: ValueError unless 1 <= k_a, k_b <= d.

    Example:
        >>> random_subspace_overlap(4096, 16, 64)
        0.015625
    """
    if not (1 <= k_a <= d and 1 <= k_b <= d):
        raise ValueError(f"`k_a` and `k_b` must be between 1 and `d`; got {k_a}, {k_b} and d = {d}.")
    return max(k_a, k_b) / d


def topk_overlap(
    U_a: Float[Tensor, "*batch d r_a"], U_b: Float[Tensor, "*batch d r_b"], k: int
) -> Float[Tensor, "*batch"]:
    """‖U_a[:, :k]ᵀ U_b[:, :k]‖_F² / k, in [0, 1]; k / d for random bases.

    Raises: ValueError unless 1 <= k <= min(r_a, r_b). References: Spectral Surgery, Eq. 3 (k = 4).

    Example:
        >>> topk_overlap(torch.eye(4), torch.eye(4)[:, [0, 2, 1]], k=2)
        tensor(0.5000)
    """
    a, b = _bases(U_a, U_b, ("U_a", "U_b"))
    most = min(a.shape[-1], b.shape[-1])
    if not 1 <= k <= most:
        raise ValueError(f"`k` must be between 1 and {most}, the columns that both bases have; got {k}.")
    return subspace_overlap(a[..., :k], b[..., :k])


def leading_similarity(
    U_a: Float[Tensor, "*batch d r_a"], U_b: Float[Tensor, "*batch d r_b"]
) -> Float[Tensor, "*batch"]:
    """|cos| of the angle between the first columns, the leading directions: in [0, 1].

    Raises: as `principal_cosines`.

    Example:
        >>> leading_similarity(torch.eye(4)[:, :2], -torch.eye(4)[:, :1])
        tensor(1.)
    """
    a, b = _bases(U_a, U_b, ("U_a", "U_b"))
    return (a[..., 0] * b[..., 0]).sum(-1).abs().clamp(0.0, 1.0)


def update_cosine(a: LowRank, b: LowRank) -> Float[Tensor, "*batch"]:
    """⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖), in [−1, 1]; 0 if one update is 0. If negative, the two cancel when merged.

    `random_update_cosine` is its size for random updates. Raises: ValueError if shapes or devices do not match.

    Example:
        >>> a, b = LowRank(torch.eye(2), torch.eye(2)), LowRank(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        >>> update_cosine(a, a).item(), update_cosine(a, b).item()
        (1.0, 0.0)
    """
    return a.cosine(b)


def random_update_cosine(d_out: int, d_in: int) -> float:
    """Root mean square of `update_cosine` for two randomly rotated updates of any spectra: 1/√(d_out d_in).

    Raises: ValueError unless both are at least 1.

    Example:
        >>> random_update_cosine(4096, 1024)
        0.00048828125
    """
    if d_out < 1 or d_in < 1:
        raise ValueError(f"`d_out` and `d_in` must be at least 1; got {d_out} and {d_in}.")
    return 1 / math.sqrt(d_out * d_in)


def gradient_overlap(
    gradient: Float[Tensor, "*batch d_out d_in"],
    U: Float[Tensor, "*batch d_out r_u"],
    Vh: Float[Tensor, "*batch r_v d_in"],
) -> Float[Tensor, "*batch"]:
    """κ = ‖Uᵀ G V‖_F / ‖G‖_F: the part of a gradient inside an update's subspaces, in [0, 1]; 0 for G = 0.

    `gradient` is G; U and Vh come from the update's SVD. Raises: ValueError if the shapes do not match.

    Example:
        >>> G = torch.diag(torch.tensor([3.0, 4.0]))
        >>> gradient_overlap(G, torch.eye(2)[:, :1], torch.eye(2)[:1])
        tensor(0.6000)
    """
    if U.ndim < 2 or Vh.ndim < 2 or gradient.ndim < 2 or gradient.shape[-2:] != (U.shape[-2], Vh.shape[-1]):
        raise ValueError(
            "`gradient`, `U` and `Vh` must have shapes (*batch, d_out, d_in), (*batch, d_out, r) and (*batch, r, d_in);"
            f" got {tuple(gradient.shape)}, {tuple(U.shape)} and {tuple(Vh.shape)}. Is `Vh` transposed?"
        )
    dtype = widened(torch.promote_types(gradient.dtype, torch.promote_types(U.dtype, Vh.dtype)))
    G, _ = by_peak(gradient.to(dtype))
    seen = U.to(dtype).mT @ G @ Vh.to(dtype).mT
    total = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64)
    part = torch.linalg.vector_norm(seen, dim=(-2, -1), dtype=torch.float64)
    overlap: Tensor = part / torch.where(total == 0, 1.0, total)
    return overlap.clamp(0.0, 1.0).to(dtype)


def residual_ratio(full: Float[Tensor, "*batch d_out d_in"], low_rank: LowRank) -> Float[Tensor, "*batch"]:
    """ε = ‖ΔW_FT − ΔW‖_F / ‖ΔW_FT‖_F: the relative distance of a low-rank update from the full one.

    0 if both are 0, inf if only the full one is. The residual is formed in float64, a block of rows at a time, because
    a difference of squared norms would cancel.
    Raises: ValueError if the shapes or devices differ.

    Example:
        >>> full, update = torch.diag(torch.tensor([4.0, 3.0])), LowRank(torch.eye(2)[:, :1], 4 * torch.eye(2)[:1])
        >>> residual_ratio(full, update)
        tensor(0.6000)
    """
    if full.shape != low_rank.shape or full.device != low_rank.device:
        raise ValueError(
            f"`full` must have the shape {tuple(low_rank.shape)} of `low_rank`, on {low_rank.device}; "
            f"got {tuple(full.shape)} on {full.device}."
        )
    dtype = widened(torch.promote_types(full.dtype, low_rank.dtype))
    scaling, A = low_rank.scaling, low_rank.A.double()
    A = A * (scaling.double()[..., None, None] if isinstance(scaling, Tensor) else scaling)
    unit = by_peak(full.to(dtype))[1].double()
    misses, totals = [], []
    for start in range(0, full.shape[-2], _ROWS):
        rows = full[..., start : start + _ROWS, :].double()
        misses.append(_norm((rows - low_rank.B[..., start : start + _ROWS, :].double() @ A) / unit))
        totals.append(_norm(rows / unit))
    missed, total = torch.stack(misses), torch.stack(totals)
    missed, total = missed.square().sum(0).sqrt(), total.square().sum(0).sqrt()
    empty = torch.where(missed == 0, 0.0, math.inf)
    return torch.where(total == 0, empty, missed / torch.where(total == 0, 1.0, total)).to(dtype)


_ROWS = 1024  # rows in a block: 32 MiB in float64 at d_in = 4096


def _norm(X: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1))
    return norm
