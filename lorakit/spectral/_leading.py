"""The leading singular triplets of a dense matrix, from a block Krylov subspace, and whether they are verified."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.spectral.lowrank import SVD

if TYPE_CHECKING:
    from jaxtyping import Float

_BLOCK = 32  # columns multiplied at once
_TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-9}  # a residual, relative to the largest singular value
_CHECK_EVERY = 4  # blocks between looks at the residuals
_LARGEST_SHARE = 0.4  # of the smaller side: beyond it a full SVD is as fast
_POWER_STEPS = 8  # for the norm of what is left


def leading_svd(W: Float[Tensor, "d_out d_in"], k: int) -> SVD | None:
    """The k leading singular triplets of W, or None where they are not verified within the subspace's largest size.

    Golub–Kahan bidiagonalization in blocks with full reorthogonalization, from random directions of a generator of its
    own. Verified means: ‖W v − σ u‖ and ‖Wᵀ u − σ v‖ are at most 4e-6 σ_1 (1e-9 σ_1 in float64) for every triplet, and
    what is left of W has no direction longer than σ_k, which power steps from new random directions look for: equal
    singular values that the subspace has missed would show there.
    W is float32 or float64, and finite. Nothing is formed that is larger than W.

    References: Golub, Luk and Overton, "A block Lanczos method for computing the singular values and corresponding
        singular vectors of a matrix", 1981; Musco and Musco, "Randomized block Krylov methods for stronger and faster
        approximate singular value decomposition", 2015.

    Example:
        >>> W = torch.diag(torch.arange(400.0, 0.0, -1.0))
        >>> found = leading_svd(W, 3)
        >>> found.S
        tensor([400., 399., 398.])
    """
    generator = torch.Generator(W.device).manual_seed(0)
    largest = int(_LARGEST_SHARE * min(W.shape))
    V = W.new_empty(W.shape[1], 0)
    U = W.new_empty(W.shape[0], 0)
    images = W.new_empty(W.shape[0], 0)  # W V
    new = torch.randn(W.shape[1], _BLOCK, generator=generator, dtype=W.dtype, device=W.device)
    steps = 0
    while V.shape[1] + _BLOCK <= largest:
        block = _orthonormal(new, V, generator)
        image = W @ block
        V, images = torch.cat([V, block], 1), torch.cat([images, image], 1)
        U = torch.cat([U, _orthonormal(image, U, generator)], 1)
        steps += 1
        if V.shape[1] >= k + _BLOCK and steps % _CHECK_EVERY == 0:
            found = _ritz(U, images, V, k)
            if _converged(W, found):
                return found if _nothing_missed(W, found, generator) else None
        new = _transposed_times(W, U[:, -_BLOCK:])
    return None


def _transposed_times(W: Tensor, X: Tensor) -> Tensor:
    """Wᵀ X for few columns, several times as fast on a CPU as ``W.mT @ X``."""
    return (X.mT @ W).mT


def _orthonormal(new: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, orthogonal to `basis`, that span `new`; random ones stand in for what is in its span."""
    scale = torch.linalg.vector_norm(new, dim=0).amax()
    for _ in range(2):
        new = new - basis @ (basis.mT @ new)
    left = torch.linalg.vector_norm(new, dim=0)
    lost = left <= 64 * torch.finfo(new.dtype).eps * scale
    fresh = torch.randn(new.shape, generator=generator, dtype=new.dtype, device=new.device)
    new = torch.where(lost, fresh, new / left.where(~lost, 1))
    for _ in range(2):
        new = torch.linalg.qr(new - basis @ (basis.mT @ new)).Q
    return new


def _ritz(U: Tensor, images: Tensor, V: Tensor, k: int) -> SVD:
    left, S, right = torch.linalg.svd(U.mT @ images, full_matrices=False)
    return SVD(U @ left[:, :k], S[:k], right[:k] @ V.mT)


def _converged(W: Tensor, found: SVD) -> bool:
    U, S, Vh = found
    limit = _TOLERANCE[W.dtype] * S[0]
    outputs = torch.linalg.vector_norm(W @ Vh.mT - U * S, dim=0)
    inputs = torch.linalg.vector_norm(_transposed_times(W, U) - Vh.mT * S, dim=0)
    return bool((torch.maximum(outputs, inputs) <= limit).all())


def _nothing_missed(W: Tensor, found: SVD, generator: torch.Generator) -> bool:
    """Whether no direction that power steps find outside the triplets is longer than the last of them."""
    U, S, Vh = found
    x = torch.randn(W.shape[1], _BLOCK, generator=generator, dtype=W.dtype, device=W.device)
    for _ in range(_POWER_STEPS):
        x = torch.linalg.qr(x - Vh.mT @ (Vh @ x)).Q
        y = W @ x
        y = y - U @ (U.mT @ y)
        x = _transposed_times(W, y)
    longest = torch.linalg.matrix_norm(y, 2)
    return bool(longest <= S[-1] + _TOLERANCE[W.dtype] * S[0])
