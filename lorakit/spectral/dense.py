"""The best low-rank factors of a dense matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.spectral.lowrank import LowRank

if TYPE_CHECKING:
    from jaxtyping import Float


def leading(matrix: Float[Tensor, "d_out d_in"]) -> tuple[Tensor, Tensor, bool]:
    """Singular values (descending) and vectors of the shorter side, by the eigenvectors of its Gram matrix in float64.

    Returns S (m,), V (m, m) with m = min(d_out, d_in), and whether V is of the rows (d_out <= d_in). Singular values
    are within 1e-8 · σ_max; several times as fast as an SVD.
    """
    left = matrix.shape[0] <= matrix.shape[1]
    wide = (matrix if left else matrix.mT).double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    return values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1), left


def factored(matrix: Float[Tensor, "d_out d_in"], vectors: Tensor, left: bool, rank: int) -> LowRank:
    """The best approximation of rank `rank`, with balanced factors in float32 or better, from what `leading` gave.

    It is the projection on the leading vectors, so its error is optimal to second order in theirs: to 1e-12 of ‖M‖_F².
    """
    V, M = vectors[:, :rank], matrix.double()
    cut = LowRank(V, V.mT @ M) if left else LowRank(M @ V, V.mT)
    return cut.truncate(rank).to(dtype=torch.promote_types(matrix.dtype, torch.float32))
