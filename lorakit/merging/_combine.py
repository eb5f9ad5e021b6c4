"""How the updates of one module are combined.

References: Yadav et al., "TIES-Merging", NeurIPS 2023; Yu et al., "Language Models are Super Mario" (DARE), ICML 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit.spectral import LowRank, energy_rank
from lorakit.spectral.dense import factored, leading

Method = Literal["linear", "svd", "ties", "dare"]
METHODS: tuple[Method, ...] = get_args(Method)
DENSE: tuple[Method, ...] = ("ties", "dare")  # defined entry by entry of ΔW

Items = list[tuple[LowRank, float]]  # the updates of one module, with their weights
Combine = Callable[[list[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Merged:
    """Of one module's merge: its rank before the cut and after, and the energies ‖ΔW‖_F² kept and of the whole."""

    rank: int
    kept_rank: int
    kept: float
    total: float


def combiner(method: str, density: float | None) -> Combine | None:
    """PEFT's function from dense updates and weights to their merge; None for methods in factor space."""
    if method not in DENSE:
        return None
    from peft.utils.merge_utils import dare_linear, task_arithmetic, ties

    if density == 1 and method == "dare":  # nothing is left out
        return lambda dense, weights: task_arithmetic(dense, weights)
    function = ties if method == "ties" else dare_linear

    def combine(dense: list[Tensor], weights: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density 1")
            merged: Tensor = function(dense, weights, density)
            return merged

    return combine


def merged(items: Items, combine: Combine | None, rank: int | None) -> tuple[LowRank, Merged]:
    """The merge of one module, of scaling 1, cut to `rank`; exact where that is None.

    With `combine` the updates are formed, and `rank` must be given.
    """
    if combine is not None:
        assert rank is not None
        if items[0][0].B.ndim > 2:
            return _of_experts(items, combine, rank)
        dense = _dense(items, combine)
        sigma, vectors, left = leading(dense)
        return _result(factored(dense, vectors, left, rank), len(sigma), sigma)
    total = _sum(items)
    if rank is None:
        energy = max(0.0, float(total.inner(total).sum()))
        return total, Merged(total.rank, total.rank, energy, energy)
    sigma = total.singular_values().double()
    return _result(total.truncate(rank) if rank < total.rank else total, total.rank, sigma)


def least_rank(items: Items, combine: Combine | None, energy: float) -> int:
    """The smallest rank, at least 1, that keeps a share of the energy of one module's merge, or of every expert's."""
    if combine is not None and items[0][0].B.ndim > 2:
        return max(least_rank(each, combine, energy) for each in _by_expert(items))
    sigma = _sum(items).singular_values() if combine is None else leading(_dense(items, combine))[0]
    return max(1, int(energy_rank(sigma, energy).max()))


def _dense(items: Items, combine: Combine) -> Tensor:
    updates = [update.dense() for update, _ in items]
    return combine(updates, torch.tensor([weight for _, weight in items], dtype=updates[0].dtype))


def _sum(items: Items) -> LowRank:
    """Σ wᵢ ΔWᵢ with scaling 1, in float32 or better."""
    total = LowRank.sum([(update * weight).to(dtype=_wide(update)) for update, weight in items])
    return total if total.scaling == 1 else LowRank(total.B * float(total.scaling), total.A)


def _wide(update: LowRank) -> torch.dtype:
    return torch.promote_types(update.dtype, torch.float32)


def _result(update: LowRank, rank: int, sigma: Tensor) -> tuple[LowRank, Merged]:
    squares = sigma.double().square()
    return update, Merged(rank, update.rank, float(squares[..., : update.rank].sum()), float(squares.sum()))


def _of_experts(items: Items, combine: Combine, rank: int) -> tuple[LowRank, Merged]:
    """The merges of a stack of experts, each formed by itself, at one rank."""
    updates, merges = zip(*(merged(each, combine, rank) for each in _by_expert(items)), strict=True)
    update = LowRank(torch.stack([one.B for one in updates]), torch.stack([one.A for one in updates]))
    kept, total = sum(one.kept for one in merges), sum(one.total for one in merges)
    return update, Merged(merges[0].rank, update.rank, kept, total)


def _by_expert(items: Items) -> list[Items]:
    experts = items[0][0].B.shape[0]
    return [[(LowRank(u.B[e], u.A[e], u.scaling), weight) for u, weight in items] for e in range(experts)]
