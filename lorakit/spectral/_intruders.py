"""Intruder dimensions: leading singular vectors of a tuned weight that resemble none of the weight before.

Reference: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPACINGS = 16  # of the largest singular value


def intruder_vectors(W: Tensor, tuned: Tensor, *, top_k: int, below: float) -> Tensor:
    """The left singular vectors (d_out, n) among the `top_k` leading ones of `tuned` that are intruders, in order.

    |cos| with every left singular vector of W (d_out, d_in) is below `below`. Vectors of singular values that rounding
    cannot tell apart count as one subspace of W, and those of singular value 0 are ignored.
    """
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    U_tuned, S_tuned, _ = torch.linalg.svd(tuned, full_matrices=False)
    examined = min(top_k, int((resolution(S_tuned) < S_tuned).sum()))
    vectors: Tensor = U_tuned[:, :examined]
    intruders: Tensor = vectors[:, nearest_cosines((U.mT @ vectors).square(), S) < below]
    return intruders


def nearest_cosines(squares: Tensor, S: Tensor) -> Tensor:
    """For each of n vectors the largest |cos| (n,) with a singular vector or subspace, of singular values S (m,).

    `squares` (m, n): the squared cosines with each singular vector.
    """
    of_base = subspaces(indistinguishable(S))
    # singular value 0: one index past the last subspace, for directions that W does not have
    real = torch.where(resolution(S) < S, of_base, int(of_base[-1]) + 1)
    return projections(squares, real)[: int(of_base[-1]) + 1].amax(0).sqrt()


def resolution(S: Tensor) -> Tensor:
    """The distance below which rounding leaves two singular values indistinguishable."""
    return _SPACINGS * torch.finfo(S.dtype).eps * S[0]


def indistinguishable(S: Tensor) -> Tensor:
    """For each singular value but the first: whether it is indistinguishable from the one before."""
    return S[:-1] - S[1:] <= resolution(S)


def subspaces(merged: Tensor) -> Tensor:
    """The number of the subspace that each index belongs to."""
    return torch.nn.functional.pad((~merged).long().cumsum(0), (1, 0))


def projections(squares: Tensor, subspaces: Tensor) -> Tensor:
    """Squared norms of projections of each column's vector onto each subspace, which is a set of rows."""
    return squares.new_zeros(int(subspaces.max()) + 1, squares.shape[1]).index_add(0, subspaces, squares)
