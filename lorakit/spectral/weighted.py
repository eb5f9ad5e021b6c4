"""Low-rank updates weighted by a module's inputs: ‖ΔW C^½‖_F, where C = E[x xᵀ] is the inputs' second moment.

‖ΔW C^½‖_F² = E‖ΔW x‖², so what is small in this norm changes the module's outputs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.spectral.lowrank import LowRank

if TYPE_CHECKING:
    from jaxtyping import Float

_ROWS = 1 << 12  # activations in float64 at a time


def input_weighted(
    update: LowRank,
    *,
    activations: Float[Tensor, "*n d_in"] | None = None,
    second_moment: Float[Tensor, "d_in d_in"] | None = None,
) -> LowRank:
    """B T with T Tᵀ = A C Aᵀ, in float64. It has the singular values and left singular vectors of ΔW C^½.

    Give C as `second_moment` (symmetric, positive semidefinite), or the inputs themselves as `activations`; then C is
    the mean of x xᵀ. C may have any rank. Its root is never formed: T is (r, r) or narrower.
    Raises: ValueError unless exactly one of the two is given, of the right shape and finite; TypeError for tensors that
    are not floating-point.

    Example:
        >>> update = LowRank(torch.eye(2), torch.diag(torch.tensor([2.0, 1.0])))
        >>> input_weighted(update, second_moment=torch.diag(torch.tensor([0.0625, 1.0]))).singular_values()
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if (activations is None) == (second_moment is None):
        passed = "neither" if activations is None else "both"
        raise ValueError(f"Exactly one of `activations` and `second_moment` is required; got {passed}.")
    if update.B.ndim != 2:
        raise ValueError(f"`update` must be one module's update, not a batch; got shape {tuple(update.shape)}.")
    given, name = (activations, "activations") if activations is not None else (second_moment, "second_moment")
    if not isinstance(given, Tensor) or not given.is_floating_point():
        came = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"`{name}` must be a real floating-point tensor; got {came}.")
    d_in = update.shape[-1]
    square = name == "activations" or given.shape == (d_in, d_in)
    if given.ndim == 0 or given.shape[-1] != d_in or given.numel() == 0 or not square:
        wanted = f"(n, {d_in})" if name == "activations" else f"({d_in}, {d_in})"
        raise ValueError(f"`{name}` must have shape {wanted}; got {tuple(given.shape)}.")
    A = update.A.double()
    T = _from_rows(given.reshape(-1, d_in), A) if name == "activations" else _from_moment(given, A)
    return LowRank(update.B.double(), T, update.scaling)


def _from_rows(X: Tensor, A: Tensor) -> Tensor:
    seen = torch.cat([rows.to(A) @ A.mT for rows in torch.split(X, _ROWS)]) / len(X) ** 0.5
    if not bool(seen.isfinite().all()):
        raise ValueError("`activations` must be finite; got NaN or infinite entries.")
    R: Tensor = torch.linalg.qr(seen, mode="r").R
    return R.mT


def _from_moment(C: Tensor, A: Tensor) -> Tensor:
    C = C.to(A)
    if not bool(C.isfinite().all()):
        raise ValueError("`second_moment` must be finite; got NaN or infinite entries.")
    if not torch.allclose(C, C.mT, rtol=1e-4, atol=1e-5 * float(C.abs().max())):
        raise ValueError("`second_moment` must be symmetric. Pass the inputs themselves as `activations`.")
    seen = A @ C @ A.mT
    values, vectors = torch.linalg.eigh((seen + seen.mT) / 2)
    if float(values[0]) < -1e-5 * float(values.abs().max()):
        raise ValueError(f"`second_moment` must be positive semidefinite; got an eigenvalue of {float(values[0]):.3g}.")
    T: Tensor = vectors * values.clamp(min=0).sqrt()
    return T


def truncate_weighted(update: LowRank, weighted: LowRank, rank: int) -> LowRank:
    """The update ΔŴ of rank `rank` that minimizes ‖(ΔW − ΔŴ) C^½‖_F; `weighted` is what `input_weighted` returned.

    ΔŴ = U Uᵀ ΔW, where U holds the leading left singular vectors of ΔW C^½. So C is never inverted, and ΔŴ is never
    worse than the plain truncation in this norm. If C has fewer than `rank` directions, the remaining rank goes to the
    best plain approximation of the rest. The factors are balanced, in float32 or better.
    Reference: Eckart & Young, Psychometrika 1936, applied to ΔW C^½ (as in SVD-LLM, Wang et al., ICLR 2025).
    """
    U = weighted.svd().U[:, : min(rank, int(weighted.numerical_rank(1e-7)))]  # σ from a moment: within 1e-8 σ_max
    B, A = update.B.double(), update.A.double()
    along = U.mT @ B
    kept = LowRank(U, along @ A, update.scaling)
    if U.shape[1] < rank:
        kept = kept.add(LowRank(B - U @ along, A, update.scaling).truncate(rank - U.shape[1]))
    balanced = kept.truncate(rank)
    return balanced.to(dtype=torch.promote_types(update.dtype, torch.float32))
