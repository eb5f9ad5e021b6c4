"""What fine-tuning did to one weight: its singular values and vectors before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.spectral import effective_rank, energy_rank, stable_rank

_RESOLUTION = 16  # spacings of the largest singular value


def update_numbers(update: Tensor, W: Tensor, energy: float) -> dict[str, Any]:
    """Norms and ranks of ΔW (d_out, d_in), and its size relative to W."""
    sigma = torch.linalg.svdvals(update)
    change, size = norm(sigma), norm(W)
    return {
        "frobenius_norm": size,
        "update_frobenius_norm": change,
        "relative_change": change / size if size else None,
        "update_spectral_norm": float(sigma[0]),
        "update_effective_rank": float(effective_rank(sigma)),
        "update_stable_rank": float(stable_rank(sigma)),
        "update_energy_rank": int(energy_rank(sigma, energy)),
    }


def vector_numbers(W: Tensor, tuned: Tensor, *, rank: int | None, top_k: int, intruder_below: float) -> dict[str, Any]:
    """Singular values of W and W' (d_out, d_in), cosines of singular vectors of the same index, and intruders.

    Vectors of singular values that rounding cannot tell apart are known only as a subspace. For them |cos| is the norm
    of the projection onto the subspace, and the cosine of the same index is the root mean square over it.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U_tuned, S_tuned, Vh_tuned = torch.linalg.svd(tuned, full_matrices=False)
    kept = slice(rank)
    of_base = _subspaces(_indistinguishable(S))
    of_both = _subspaces(_indistinguishable(S) | _indistinguishable(S_tuned))
    # singular value 0: one index past the last subspace, for directions that W does not have
    real = torch.where(_resolution(S) < S, of_base, int(of_base[-1]) + 1)
    examined = min(top_k, int((_resolution(S_tuned) < S_tuned).sum()))
    found: dict[str, Any] = {}
    for side, first, second in (("output", U.mT, U_tuned), ("input", Vh, Vh_tuned.mT)):
        squares = (first @ second).square()
        cosines = _same_index(squares, of_both)[kept]
        nearest = _projections(squares[:, :examined], real)[: int(of_base[-1]) + 1].amax(0).sqrt()
        intruders = (nearest < intruder_below).nonzero()[:, 0].tolist()
        found[f"{side}_cosines"] = tuple(cosines.tolist())
        found[f"{side}_cosine_mean"] = float(cosines.mean())
        found["intruders" if side == "output" else "input_intruders"] = tuple(intruders)
    size = norm(S)
    return found | {
        "spectrum_shift": norm(S_tuned - S) / size if size else None,
        "singular_values": tuple(S[kept].tolist()),
        "tuned_singular_values": tuple(S_tuned[kept].tolist()),
    }


def _resolution(S: Tensor) -> Tensor:
    """The distance below which rounding leaves two singular values indistinguishable."""
    return _RESOLUTION * torch.finfo(S.dtype).eps * S[0]


def _indistinguishable(S: Tensor) -> Tensor:
    """For each singular value but the first: whether it is indistinguishable from the one before."""
    return S[:-1] - S[1:] <= _resolution(S)


def _subspaces(merged: Tensor) -> Tensor:
    """The number of the subspace that each index belongs to."""
    return torch.nn.functional.pad((~merged).long().cumsum(0), (1, 0))


def _projections(squares: Tensor, subspaces: Tensor) -> Tensor:
    """Squared norms of projections of each column's vector onto each subspace, which is a set of rows."""
    return squares.new_zeros(int(subspaces.max()) + 1, squares.shape[1]).index_add(0, subspaces, squares)


def _same_index(squares: Tensor, subspaces: Tensor) -> Tensor:
    """|cos| of the vectors with the same index, as the root mean square over each subspace."""
    own = _projections(squares, subspaces).gather(0, subspaces[None])[0]
    sums = own.new_zeros(int(subspaces[-1]) + 1).index_add(0, subspaces, own)
    counts = own.new_zeros(int(subspaces[-1]) + 1).index_add(0, subspaces, torch.ones_like(own))
    return (sums / counts)[subspaces].sqrt().clamp(0.0, 1.0)


def norm(values: Tensor) -> float:
    """The Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
