"""Linear algebra of a low-rank update ΔW = scaling · B A, from its factors. ΔW itself is never formed.

Everything is batched over leading dimensions. On the CPU, singular values come from r × r Gram matrices where these are
accurate enough. On other devices they come from QR, without a branch, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorakit.spectral import _product
from lorakit.spectral._product import widened

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["SVD", "LowRank"]


class SVD(NamedTuple):
    """Thin SVD, ΔW = U diag(S) Vh, with S descending."""

    U: Float[Tensor, "*batch d_out m"]
    S: Float[Tensor, "*batch m"]
    Vh: Float[Tensor, "*batch m d_in"]


def _check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"`{name}` must be a real floating-point tensor; got {came}. Convert it first.")


def _broadcast(*shapes: torch.Size) -> torch.Size:
    batch: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return batch


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ΔW = scaling · B A of one module, or of a batch of modules of the same shape.

    Shapes: B (*batch, d_out, r), A (*batch, r, d_in). `scaling` is a number, or a tensor of shape `*batch` if modules
    differ in it. r = 0 and empty batches are allowed, and r may exceed d_out and d_in.
    Results are float64 for float64 factors and float32 otherwise; the arithmetic in between is float64.
    Decompositions of non-finite factors raise ValueError on the CPU. On an accelerator, where the check would make the
    host wait, they return what torch returns.
    Raises: TypeError unless both factors are real floating-point tensors of the same dtype; ValueError if shapes or
    devices do not match, or the scaling is not finite.

    Example:
        >>> update = LowRank(B=torch.eye(3)[:, :2], A=torch.tensor([[3.0, 0.0], [0.0, 1.0]]), scaling=2.0)
        >>> update.shape, update.rank, update.singular_values()
        (torch.Size([3, 2]), 2, tensor([6., 2.]))
        >>> update.truncate(1).dense()
        tensor([[6., 0.],
                [0., 0.],
                [0., 0.]])
    """

    B: Float[Tensor, "*batch d_out r"]
    A: Float[Tensor, "*batch r d_in"]
    scaling: float | Float[Tensor, "*batch"] = 1.0

    def __post_init__(self) -> None:
        B, A = self.B, self.A
        _check_floating(B, "B")
        _check_floating(A, "A")
        if B.dtype != A.dtype:
            raise TypeError(f"`B` and `A` must have one dtype; got {B.dtype} and {A.dtype}. Convert one of them.")
        if B.device != A.device:
            raise ValueError(f"`B` and `A` must be on one device; got {B.device} and {A.device}. Move one of them.")
        b, a = B.shape, A.shape
        if len(b) < 2 or len(a) < 2 or b[-1] != a[-2] or b[:-2] != a[:-2] or b[-2] == 0 or a[-1] == 0:
            raise ValueError(
                "`B` and `A` must have shapes (*batch, d_out, r) and (*batch, r, d_in) with the same batch and r, and "
                f"d_out, d_in >= 1; got {tuple(b)} and {tuple(a)}. Is one of them transposed?"
            )
        self._check_scaling()

    def _check_scaling(self) -> None:
        scaling, B = self.scaling, self.B
        if isinstance(scaling, Tensor):
            if not scaling.is_floating_point():
                raise TypeError(f"`scaling` must be real and floating-point; got {scaling.dtype}. Convert it first.")
            if scaling.shape not in (B.shape[:-2], torch.Size()):
                raise ValueError(
                    f"`scaling` must be a number or have the batch shape {tuple(B.shape[:-2])}; "
                    f"got shape {tuple(scaling.shape)}. Reshape it to one value a module."
                )
            if scaling.device != B.device:
                raise ValueError(f"`scaling` must be on the device of `B`, {B.device}; got {scaling.device}. Move it.")
        elif isinstance(scaling, bool) or not isinstance(scaling, int | float):
            raise TypeError(f"`scaling` must be a number or a tensor; got {type(scaling).__name__}.")
        elif not math.isfinite(scaling):
            raise ValueError(f"`scaling` must be finite; got {scaling}. Is the rank it was divided by 0?")

    @classmethod
    def from_svd(
        cls,
        U: Float[Tensor, "*batch d_out m"],
        S: Float[Tensor, "*batch m"],
        Vh: Float[Tensor, "*batch m d_in"],
        scaling: float | Float[Tensor, "*batch"] = 1.0,
    ) -> LowRank:
        """Balanced factors of U diag(S) Vh: B = U √(S / scaling), A = √(S / scaling) Vh.

        The signs of `scaling` and `S` go into B. The factors are 0 where `scaling` or S is 0. Half precision is
        computed and returned in float32. √S has no derivative at 0.
        Raises: ValueError or TypeError, as the class does.
        """
        for name, part in (("U", U), ("S", S), ("Vh", Vh)):
            _check_floating(part, name)
        if U.ndim < 2 or Vh.ndim < 2 or S.shape != U.shape[:-2] + U.shape[-1:] or S.shape != Vh.shape[:-1]:
            raise ValueError(
                "`U`, `S` and `Vh` must have shapes (*batch, d_out, m), (*batch, m) and (*batch, m, d_in); "
                f"got {tuple(U.shape)}, {tuple(S.shape)} and {tuple(Vh.shape)}. Is `Vh` transposed?"
            )
        dtype = widened(torch.promote_types(torch.promote_types(U.dtype, S.dtype), Vh.dtype))
        factor = torch.as_tensor(scaling, dtype=torch.float64, device=S.device)[..., None]
        zero = factor == 0
        root = (S.abs() / torch.where(zero, 1.0, factor.abs())).sqrt().masked_fill(zero, 0.0)
        sign = torch.where((S < 0) ^ (factor < 0), -1.0, 1.0)
        B = U * (sign * root)[..., None, :]
        return cls(B.to(dtype), (root[..., None] * Vh).to(dtype), scaling)

    @classmethod
    def sum(cls, items: Iterable[LowRank], rank: int | None = None) -> LowRank:
        """Σ ΔW of the items: exact, or with `rank` its best approximation of that rank.

        The factors are concatenated. If the sum of their ranks exceeds min(d_out, d_in), they are compressed to that
        rank, which loses nothing. Raises: ValueError if there is no item or the shapes differ.
        """
        items = list(items)
        if not items:
            raise ValueError("`items` must have at least one LowRank, which gives the shape; got none.")
        total = items[0].add(*items[1:])
        if rank is not None:
            return total.truncate(rank)
        full = min(total.shape[-2:])
        return total.truncate(full) if total.rank > full else total

    @property
    def shape(self) -> torch.Size:
        """Shape of ΔW: (*batch, d_out, d_in)."""
        return self.B.shape[:-1] + self.A.shape[-1:]

    @property
    def rank(self) -> int:
        """The dimension r of the factors. The rank of ΔW may be lower, see `numerical_rank`."""
        return self.B.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors; results may be wider."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LowRank:
        """The same update with its factors in another dtype or on another device."""
        scaling = self.scaling.to(device=device) if isinstance(self.scaling, Tensor) else self.scaling
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype), scaling)

    def dense(self) -> Float[Tensor, "*batch d_out d_in"]:
        """ΔW itself, with d_out · d_in entries per module: for small shapes, and to write merged weights."""
        dtype = widened(self.dtype)
        product = self.B.to(dtype) @ self.A.to(dtype)
        scaling = self.scaling
        return product * (scaling.to(dtype)[..., None, None] if isinstance(scaling, Tensor) else scaling)

    def singular_values(self) -> Float[Tensor, "*batch m"]:
        """The m = min(r, d_out, d_in) singular values of ΔW, descending.

        Each is within 1e-6 · σ_max for float32 and half factors, and within 1e-12 · σ_max for float64 factors, as long
        as σ_max stays well above the rounding of the arithmetic, 1e-16 ‖B‖ ‖A‖ (B and A may cancel).
        Gradients with respect to B, A and a tensor `scaling` are u_kᵀ dΔW v_k. They are the derivatives where σ_k is
        positive and distinct; elsewhere they are finite and depend on the choice of u_k and v_k. There are no second
        derivatives.
        Raises: ValueError for non-finite factors on the CPU.
        """
        sigma = _product.singular_values(self.B, self.A)
        if isinstance(self.scaling, Tensor) or self.scaling != 1:
            sigma = sigma * self._magnitude()
        return sigma.to(widened(self.dtype))

    def svd(self) -> SVD:
        """Thin SVD of ΔW, scaling included. U has orthonormal columns and Vh orthonormal rows, for any rank.

        Shapes: U (*batch, d_out, m), S (*batch, m), Vh (*batch, m, d_in), m = min(r, d_out, d_in). The sign of a
        negative scaling goes into U. Gradients are torch's own, of QR and SVD: they need linearly independent columns
        of B and rows of A, and distinct positive S. Elsewhere they are not finite.
        Raises: ValueError for non-finite factors on the CPU.
        """
        dtype = widened(self.dtype)
        return SVD(*(part.to(dtype) for part in self._svd()))

    def _svd(self) -> SVD:
        U, S, Vh = _product.svd(self.B, self.A)
        scaling = self.scaling
        if isinstance(scaling, Tensor):
            U = torch.where(scaling[..., None, None] < 0, -U, U)
        elif scaling < 0:
            U = -U
        return SVD(U, S * self._magnitude(), Vh)

    def _magnitude(self) -> float | Tensor:
        """|scaling|, ready to multiply singular values with."""
        scaling = self.scaling
        return scaling.double().abs()[..., None] if isinstance(scaling, Tensor) else abs(scaling)

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of ΔW of rank `rank`, in Frobenius and spectral norm, with balanced factors.

        A `rank` above min(r, d_out, d_in) keeps everything. The scaling is kept, and half precision becomes float32.
        Raises: ValueError for a negative rank, TypeError for one that is not an integer.
        References: Eckart & Young, Psychometrika 1936.
        """
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"`rank` must be an integer; got {type(rank).__name__}.")
        if rank < 0:
            raise ValueError(f"`rank` must be at least 0; got {rank}.")
        U, S, Vh = self._svd()
        kept = LowRank.from_svd(U[..., :rank], S[..., :rank], Vh[..., :rank, :], self.scaling)
        return kept.to(dtype=widened(self.dtype))

    def numerical_rank(self, rtol: float | None = None) -> Int[Tensor, "*batch"]:
        """How many singular values exceed `rtol` · σ_max and the rounding of the arithmetic; 0 for ΔW = 0.

        The default `rtol` is r times the machine epsilon of the result's dtype. The rounding is that of the product
        B A, so an update that cancels entirely has rank 0.
        """
        if rtol is None:
            rtol = torch.finfo(widened(self.dtype)).eps * self.rank
        elif not 0 <= rtol < 1:
            raise ValueError(f"`rtol` must be in [0, 1), relative to the largest singular value; got {rtol}.")
        if self.rank == 0:
            return torch.zeros(self.shape[:-2], dtype=torch.int64, device=self.device)
        with torch.no_grad():
            sigma = _product.singular_values(self.B, self.A)
            size = torch.linalg.matrix_norm(self.B, dtype=torch.float64)
            size = size * torch.linalg.matrix_norm(self.A, dtype=torch.float64)
            cutoff = torch.maximum(rtol * sigma[..., 0], 8 * torch.finfo(torch.float64).eps * size)
            above = sigma > cutoff[..., None]
            return (above & (torch.as_tensor(self._magnitude(), device=self.device) != 0)).sum(-1)

    def compress(self, rtol: float | None = None) -> LowRank:
        """The same update without its numerically zero part: r becomes the numerical rank, the largest in a batch.

        The result's shape depends on the data, so this waits for the device.
        """
        ranks = self.numerical_rank(rtol)
        return self.truncate(int(ranks.max()) if ranks.numel() else 0)

    def frobenius_norm(self) -> Float[Tensor, "*batch"]:
        """‖ΔW‖_F; 0 where r = 0."""
        sigma = self.singular_values()
        if self.rank == 0:
            return sigma.sum(-1)
        peak = sigma.detach()[..., :1]
        unit = torch.where((peak == 0) | peak.isinf(), 1.0, peak)  # squares may overflow, and underflow
        norm: Tensor = torch.linalg.vector_norm(sigma / unit, dim=-1)
        return norm * unit[..., 0]

    def spectral_norm(self) -> Float[Tensor, "*batch"]:
        """‖ΔW‖_2 = σ_max; 0 where r = 0."""
        sigma = self.singular_values()
        return sigma[..., 0] if self.rank else sigma.sum(-1)

    def inner(self, other: LowRank) -> Float[Tensor, "*batch"]:
        """Frobenius inner product ⟨ΔW_a, ΔW_b⟩ = scaling_a scaling_b Σ (B_aᵀ B_b) ∘ (A_a A_bᵀ), accumulated in float64.

        Ranks and dtypes may differ, and batches broadcast.
        Raises: ValueError if d_out, d_in or the devices differ, or the batches do not broadcast.
        """
        self._check_match(other)
        product = _product.inner(self.B, self.A, other.B, other.A)
        for scaling in (self.scaling, other.scaling):
            product = product * (scaling.double() if isinstance(scaling, Tensor) else scaling)
        return product.to(widened(torch.promote_types(self.dtype, other.dtype)))

    def cosine(self, other: LowRank) -> Float[Tensor, "*batch"]:
        """⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖), in [−1, 1]; 0 where one of them is 0. Raises: ValueError as `inner`."""
        self._check_match(other)
        a, b = self._unit(), other._unit()
        cosine = _product.inner(a.B, a.A, b.B, b.A).clamp(-1.0, 1.0)
        for scaling in (self.scaling, other.scaling):
            cosine = cosine * (
                scaling.double().sign() if isinstance(scaling, Tensor) else (scaling > 0) - (scaling < 0)
            )
        return cosine.to(widened(torch.promote_types(self.dtype, other.dtype)))

    def _unit(self) -> LowRank:
        """B A divided by its norm, in the dtype of the results; 0 where it is 0."""
        dtype = widened(self.dtype)
        unit = LowRank(_product.by_peak(self.B.to(dtype))[0], _product.by_peak(self.A.to(dtype))[0])
        norm = unit.frobenius_norm().double()[..., None, None]
        return LowRank(unit.B / torch.where(norm == 0, 1.0, norm), unit.A.double())

    def add(self, *others: LowRank) -> LowRank:
        """ΔW + Σ ΔW_others, by concatenating the factors: ranks add up, and batches broadcast.

        Exact if the scalings agree. Otherwise they are folded into B, in float32 or better, with one rounding.
        Raises: TypeError if an argument is not a LowRank; ValueError as `inner`.
        """
        for other in others:
            self._check_match(other)
        items = (self, *others)
        dtype, scaling = self.dtype, self.scaling
        for item in others:
            dtype = torch.promote_types(dtype, item.dtype)
        folded = any(isinstance(i.scaling, Tensor) or i.scaling != scaling for i in items) and len(items) > 1
        if folded:
            dtype, scaling = widened(dtype), 1.0
        batch = _broadcast(*(item.shape[:-2] for item in items))
        Bs = [(item._scaled_b() if folded else item.B).to(dtype).expand(*batch, -1, -1) for item in items]
        As = [item.A.to(dtype).expand(*batch, -1, -1) for item in items]
        return LowRank(torch.cat(Bs, -1), torch.cat(As, -2), scaling)

    def _scaled_b(self) -> Tensor:
        scaling = self.scaling
        return self.B.double() * (scaling.double()[..., None, None] if isinstance(scaling, Tensor) else scaling)

    def scale(self, factor: float | Float[Tensor, "*batch"]) -> LowRank:
        """factor · ΔW, with the same factors and another scaling."""
        return replace(self, scaling=self.scaling * factor)

    def __add__(self, other: LowRank) -> LowRank:
        return self.add(other) if isinstance(other, LowRank) else NotImplemented

    def __sub__(self, other: LowRank) -> LowRank:
        return self.add(other.scale(-1.0)) if isinstance(other, LowRank) else NotImplemented

    def __mul__(self, factor: float | Float[Tensor, "*batch"]) -> LowRank:
        return self.scale(factor)

    __rmul__ = __mul__

    def _check_match(self, other: LowRank) -> None:
        if not isinstance(other, LowRank):
            raise TypeError(f"`other` must be a LowRank; got {type(other).__name__}.")
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(
                f"`other` must have the same d_out and d_in, {tuple(self.shape[-2:])}; got {tuple(other.shape[-2:])}."
            )
        if self.device != other.device:
            raise ValueError(f"`other` must be on the same device, {self.device}; got {other.device}. Move one.")
        try:
            _broadcast(self.shape[:-2], other.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"`other` must have a batch that broadcasts with {tuple(self.shape[:-2])}; "
                f"got {tuple(other.shape[:-2])}."
            ) from None
