"""Sketches of whole updates: 64 numbers whose inner products estimate those of the updates, whatever the gauge.

Entry j is Σ_m ε_mj y_jᵀ ΔW_m x_j over the modules m, with random signs as ε, y_j and x_j. Its square has the
expectation Σ ‖ΔW_m‖_F². It is a function of ΔW, so B G, G⁻¹ A has the same sketch for every invertible G. ΔW is never
formed.
References: Johnson & Lindenstrauss 1984; Achlioptas, "Database-friendly random projections", 2003 (signs).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.lens.static.stacks import one_by_one
from lorakit.spectral import LowRank

SIZE = 64


@torch.no_grad()
def sketch(view: Adapter) -> Tensor | None:
    """The sketch (64,) of an adapter's low-rank updates in float64; None if it is zero or not finite.

    Raises: AdapterFileError if a tensor cannot be read.
    """
    total = torch.zeros(SIZE, dtype=torch.float64)
    for modules, update in (one_by_one(*batch) for batch in view.batches()):
        total += (_projections(update) * _signs_of(tuple(module.name for module in modules))).sum(0)
    norm = float(torch.linalg.vector_norm(total))
    return total if math.isfinite(norm) and norm > 0 else None


def _projections(update: LowRank) -> Tensor:
    """y_jᵀ ΔW x_j for a batch of modules, (batch, 64) in float64."""
    dtype = torch.promote_types(update.dtype, torch.float32)
    B, A = update.B.to(dtype), update.A.to(dtype)
    left = _vectors("out", B.shape[-2], dtype) @ B  # (batch, 64, r)
    right = A @ _vectors("in", A.shape[-1], dtype).mT  # (batch, r, 64)
    scaling = torch.as_tensor(update.scaling, dtype=torch.float64).reshape(-1, 1)
    return scaling * (left.double() * right.mT.double()).sum(-1)


@functools.lru_cache(maxsize=16)
def _vectors(side: str, d: int, dtype: torch.dtype) -> Tensor:
    """The vectors y (side "out") or x (side "in") of a dimension, (64, d)."""
    return _signs(f"{side} {d}", SIZE * d).reshape(SIZE, d).to(dtype)


@functools.lru_cache(maxsize=64)
def _signs_of(names: Sequence[str]) -> Tensor:
    return torch.stack([_signs(f"module {name}", SIZE) for name in names]).double()


def _signs(label: str, count: int) -> Tensor:
    """±1, the same on every machine and in every version of torch: the bits of a hash of the label."""
    data = hashlib.shake_256(label.encode(errors="surrogatepass")).digest(-(-count // 8))
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].to(torch.float32) * 2 - 1
