"""What fine-tuning did to one weight: its singular values and vectors before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.lens.static._concentration import concentrated
from lorakit.spectral import effective_rank, energy_rank, stable_rank
from lorakit.spectral._intruders import indistinguishable, nearest_cosines, projections, resolution, subspaces
from lorakit.spectral._leading import leading_svd

_SMALL = 1024  # the smaller side of a weight up to which full SVDs are taken
_MORE = 8  # triplets beyond those asked for, so that a subspace at the end is whole
_GRAM_ROWS = 512  # of a Gram matrix computed at once
_RANK_TOLERANCE = 64  # spacings of ‖ΔW‖_F that rounding leaves outside the leading directions


def update_numbers(update: Tensor, W: Tensor, energy: float, *, rank: int | None = None) -> dict[str, Any]:
    """Norms and ranks of ΔW (d_out, d_in), and its size relative to W. `rank`: as in `vector_numbers`."""
    sigma = _update_spectrum(update, rank)
    change, size = norm(update), norm(W)
    return {
        "frobenius_norm": size,
        "update_frobenius_norm": change,
        "relative_change": change / size if size else None,
        "update_spectral_norm": float(sigma[0]),
        "update_effective_rank": float(effective_rank(sigma)),
        "update_stable_rank": float(stable_rank(sigma)),
        "update_energy_rank": int(energy_rank(sigma, energy)),
    }


def _update_spectrum(update: Tensor, rank: int | None) -> Tensor:
    """The singular values of ΔW that are not rounding: of a change of low rank, the leading ones are all of them."""
    if rank is None or min(update.shape) <= _SMALL or update.dtype == torch.float64:
        every: Tensor = torch.linalg.svdvals(update)
        return every
    few = _low_rank_spectrum(update, rank + _MORE)
    return _gram_spectrum(update) if few is None else few


def _low_rank_spectrum(update: Tensor, rank: int) -> Tensor | None:
    """The singular values of ΔW if its rank is at most `rank` but for rounding: random combinations of its columns
    then span them all, which what they leave of ΔW shows."""
    generator = torch.Generator(update.device).manual_seed(0)
    mix = torch.randn(update.shape[1], rank, generator=generator, dtype=update.dtype, device=update.device)
    basis = torch.linalg.qr(update @ mix).Q
    inside = basis.mT @ update
    left = norm(torch.addmm(update, basis, inside, alpha=-1))
    if left > _RANK_TOLERANCE * torch.finfo(update.dtype).eps * norm(update):
        return None
    sigma: Tensor = torch.linalg.svdvals(inside)
    return sigma


def _gram_spectrum(update: Tensor) -> Tensor:
    """Every singular value of ΔW from a Gram matrix in float64, where squares of float32's are exact enough."""
    wide = update.double()
    wide = wide if wide.shape[0] >= wide.shape[1] else wide.mT
    gram = wide.new_empty(wide.shape[1], wide.shape[1])
    for start in range(0, len(gram), _GRAM_ROWS):  # the lower triangle is all that `eigvalsh` reads
        end = min(start + _GRAM_ROWS, len(gram))
        gram[start:end, :end] = wide[:, start:end].mT @ wide[:, :end]
    squares: Tensor = torch.linalg.eigvalsh(gram, UPLO="L")
    return squares.flip(-1).clamp_min(0).sqrt().to(update.dtype)


def vector_numbers(W: Tensor, tuned: Tensor, *, rank: int | None, top_k: int, intruder_below: float) -> dict[str, Any]:
    """Singular values of W and W' (d_out, d_in), cosines of singular vectors of the same index, and intruders.

    Vectors of singular values that rounding cannot tell apart are known only as a subspace. For them |cos| is the norm
    of the projection onto the subspace, and the cosine of the same index is the root mean square over it.

    With a `rank`, the leading triplets of large weights come from a verified block Krylov method; where that does not
    converge, and where it cannot be told from them what is an intruder, from full SVDs.
    """
    if rank is not None and min(W.shape) > _SMALL:
        found = _from_leading(W, tuned, rank, top_k, intruder_below)
        if found is not None:
            return found
    return _from_full(W, tuned, rank, top_k, intruder_below)


def _from_full(W: Tensor, tuned: Tensor, rank: int | None, top_k: int, below: float) -> dict[str, Any]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U_tuned, S_tuned, Vh_tuned = torch.linalg.svd(tuned, full_matrices=False)
    of_both = subspaces(indistinguishable(S) | indistinguishable(S_tuned))
    examined = min(top_k, int((resolution(S_tuned) < S_tuned).sum()))
    found: dict[str, Any] = {}
    for side, first, second in (("output", U.mT, U_tuned), ("input", Vh, Vh_tuned.mT)):
        squares = (first @ second).square()
        nearest = nearest_cosines(squares[:, :examined], S)
        found |= _side(side, _same_index(squares, of_both)[slice(rank)], (nearest < below).nonzero()[:, 0].tolist())
    return found | _values(S, S_tuned, rank)


def _from_leading(W: Tensor, tuned: Tensor, rank: int, top_k: int, below: float) -> dict[str, Any] | None:
    """As `_from_full`, from the leading triplets; None where they do not settle it."""
    first = leading_svd(W, max(rank, top_k) + _MORE)
    second = None if first is None else leading_svd(tuned, max(rank, top_k) + _MORE)
    if first is None or second is None:
        return None
    S, S_tuned = first.S, second.S
    merged = indistinguishable(S) | indistinguishable(S_tuned)
    ends = (~merged[rank - 1 :]).nonzero()
    base_ends = (~indistinguishable(S)).nonzero()
    if not len(ends) or not len(base_ends):
        return None
    whole, whole_base = rank + int(ends[0]), int(base_ends[-1]) + 1
    examined = min(top_k, int((resolution(S_tuned) < S_tuned).sum()))
    found: dict[str, Any] = {}
    sides = (("output", W, first.U, second.U), ("input", W.mT, first.Vh.mT, second.Vh.mT))
    for side, weight, base_vectors, vectors in sides:
        squares = (base_vectors[:, :whole].mT @ vectors[:, :whole]).square()
        cosines = _same_index(squares, subspaces(merged[: whole - 1]))[:rank]
        intruders = _leading_intruders(
            weight, S[:whole_base], base_vectors[:, :whole_base], vectors[:, :examined], below
        )
        if intruders is None:
            return None
        found |= _side(side, cosines, intruders)
    return found | _values(S, S_tuned, rank)


def _leading_intruders(W: Tensor, S: Tensor, base: Tensor, vectors: Tensor, below: float) -> list[int] | None:
    """Which `vectors` (d, n) no left singular vector of W comes near; `base` (d, m): the leading ones, of values S."""
    squares = (base.mT @ vectors).square()
    nearest = nearest_cosines(squares, S)
    rest = vectors - base @ (base.mT @ vectors)
    sizes = torch.linalg.vector_norm(rest, dim=0)
    open_ones = ((nearest < below) & (sizes >= below)).nonzero()[:, 0].tolist()
    intruders = set(((nearest < below) & (sizes < below)).nonzero()[:, 0].tolist())
    if open_ones:
        limits = [below / float(sizes[i]) for i in open_ones]
        answers = concentrated(W, rest[:, open_ones], limits, outside=base)
        if answers is None:
            return None
        intruders |= {i for i, near in zip(open_ones, answers, strict=True) if not near}
    return sorted(intruders)


def _side(side: str, cosines: Tensor, intruders: list[int]) -> dict[str, Any]:
    return {
        f"{side}_cosines": tuple(cosines.tolist()),
        f"{side}_cosine_mean": float(cosines.mean()),
        "intruders" if side == "output" else "input_intruders": tuple(intruders),
    }


def _values(S: Tensor, S_tuned: Tensor, rank: int | None) -> dict[str, Any]:
    S, S_tuned = S[slice(rank)], S_tuned[slice(rank)]
    size = norm(S)
    return {
        "spectrum_shift": norm(S_tuned - S) / size if size else None,
        "singular_values": tuple(S.tolist()),
        "tuned_singular_values": tuple(S_tuned.tolist()),
    }


def _same_index(squares: Tensor, subspaces: Tensor) -> Tensor:
    """|cos| of the vectors with the same index, as the root mean square over each subspace."""
    own = projections(squares, subspaces).gather(0, subspaces[None])[0]
    sums = own.new_zeros(int(subspaces[-1]) + 1).index_add(0, subspaces, own)
    counts = own.new_zeros(int(subspaces[-1]) + 1).index_add(0, subspaces, torch.ones_like(own))
    return (sums / counts)[subspaces].sqrt().clamp(0.0, 1.0)


def norm(values: Tensor) -> float:
    """The Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
