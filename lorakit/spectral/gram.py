"""The spectrum of an update from its factors' Gram matrices, for factors that are sharded over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorakit.spectral._product import by_peak

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["GramSVD", "svd_from_grams"]

_CUTOFF = 1e-7  # of σ_max: smaller components are rounding, and their directions mean nothing


class GramSVD(NamedTuple):
    """Singular values S (*batch, r), descending, and X, Y (*batch, r, r) with U = B X and V = Aᵀ Y.

    The columns of X and Y for singular values below 1e-7 · σ_max are 0.
    """

    S: Float[Tensor, "*batch r"]
    X: Float[Tensor, "*batch r r"]
    Y: Float[Tensor, "*batch r r"]


@torch.no_grad()
def svd_from_grams(
    gram_B: Float[Tensor, "*batch r r"], gram_A: Float[Tensor, "*batch r r"], scaling: float | Tensor = 1.0
) -> GramSVD:
    """The SVD of ΔW = scaling · B A from gram_B = BᵀB and gram_A = A Aᵀ, with vectors in terms of B and A.

    Shapes: gram_B and gram_A (*batch, r, r); a tensor `scaling` has the batch's shape. Float64 throughout, without a
    branch on the data. From float64 Gram matrices, singular values are within 1e-7 · σ_max; use
    `LowRank.singular_values` for more accuracy where B and A are at hand. A zero update gives zeros. Gram matrices that
    are not finite give NaN in S and zeros in X and Y.

    Example:
        >>> B, A = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> svd_from_grams(B.T @ B, A @ A.T, scaling=2.0).S
        tensor([6.0000, 2.0000], dtype=torch.float64)
    """
    finite = gram_B.isfinite().all(-1).all(-1) & gram_A.isfinite().all(-1).all(-1)
    grams = (torch.where(finite[..., None, None], gram, 0.0).double() for gram in (gram_B, gram_A))
    (of_B, left), (of_A, right) = (by_peak(gram) for gram in grams)
    values, vectors = torch.linalg.eigh(of_A)
    values = values.clamp(min=0)
    kept = values > torch.finfo(torch.float64).eps * values.shape[-1] * values[..., -1:]
    half = torch.where(kept, values, 0.0).sqrt()
    root = vectors * half[..., None, :]  # A Aᵀ = root rootᵀ
    inverse = vectors * torch.where(kept, 1 / torch.where(kept, half, 1.0), 0.0)[..., None, :]
    squares, turns = torch.linalg.eigh(root.mT @ of_B @ root)  # those of (B root)ᵀ (B root)
    S = squares.flip(-1).clamp(min=0).sqrt()
    turns = turns.flip(-1)
    seen = _CUTOFF * S[..., :1] < S
    X = root @ turns * torch.where(seen, 1 / torch.where(seen, S, 1.0), 0.0)[..., None, :]
    Y = inverse @ turns * seen[..., None, :]
    factor = torch.as_tensor(scaling, dtype=torch.float64, device=S.device)[..., None]
    size = (left[..., 0].sqrt() * right[..., 0].sqrt()) * factor.abs()
    S = torch.where(finite[..., None], S * size, torch.nan)
    sign = torch.where(factor < 0, -1.0, 1.0)[..., None, :]
    return GramSVD(S, X * sign / left.sqrt(), Y / right.sqrt())
