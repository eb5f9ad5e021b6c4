"""Singular values and vectors of a product B A, and the inner product of two such products, from the factors.

Shapes: B (*batch, d_out, r), A (*batch, r, d_in). Results are float64 unless stated otherwise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from jaxtyping import Float

# Why singular values from Gram matrices are within 1e-6 σ_max (float32) and 1e-12 σ_max (float64). Write a factor as
# X = Q D, where Q has unit columns. Rounding turns its Gram matrix into D (QᵀQ + E) D, as if X had been multiplied by
# (1 + (QᵀQ)⁻¹ E)^½ (up to similarity). So a singular value of B A changes by a fraction ‖E‖ / (2 λ_min(QᵀQ)) at most.
# Long float32 sums drift: ‖E‖ reaches 1e-5 when all entries have the same size. So rows are summed in short chunks, and
# torch sums the chunks pairwise. Measured ‖E‖: below 2e-7 for random entries, near 1e-6 for entries of one size.
_CHUNK = {torch.float32: 64, torch.float64: 512}  # rows
_SMALLEST = 0.25  # λ_min from which the Gram matrix in the factor's own dtype is accurate
_DETERMINANT = 0.53  # det QᵀQ from which λ_min >= 0.25: -ln det = Σ (λ - 1 - ln λ) >= λ_min - 1 - ln λ_min
_SMALLEST_WIDE = 1e-6  # λ_min from which the float64 Gram matrix of a float32 factor is accurate, ‖E‖ < 1e-13
_TINY = 1e-24  # squared column norm above which float32 squares lose nothing to underflow


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float64 for float64, float32 for float32 and half precision."""
    return torch.promote_types(dtype, torch.float32)


def may_branch(X: Tensor) -> bool:
    """Whether a branch on the data costs nothing: an eager CPU tensor that holds data (not a fake or meta tensor)."""
    return X.is_cpu and type(X) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def by_peak(X: Float[Tensor, "*batch m n"]) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch 1 1"]]:
    """X over a power of two near its largest entry, so that products stay in range; and that power (1 for X = 0)."""
    if X.shape[-1] == 0 or X.shape[-2] == 0:
        return X, X.new_ones((*X.shape[:-2], 1, 1))
    peak = X.detach().abs().amax((-2, -1), keepdim=True)
    power = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 1)
    power = torch.where((peak > 0) & peak.isfinite(), power, 1.0)
    return X / power, power


def singular_values(B: Float[Tensor, "*batch d_out r"], A: Float[Tensor, "*batch r d_in"]) -> Float[Tensor, "*batch m"]:
    """Singular values of B A, descending; m = min(r, d_out, d_in). Differentiable once, see `_SingularValues`."""
    if torch.is_grad_enabled() and (B.requires_grad or A.requires_grad):
        differentiable: Tensor = _SingularValues.apply(B, A)  # type: ignore[no-untyped-call]
        return differentiable
    return _singular_values(B, A)


class _SingularValues(torch.autograd.Function):
    """Singular values with the derivative dσ_k = u_kᵀ d(B A) v_k, which stays finite where torch's own does not."""

    @staticmethod
    def forward(B: Tensor, A: Tensor) -> Tensor:
        return _singular_values(B, A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        B, A = ctx.saved_tensors
        U, _, Vh = svd(B, A)
        U = U * grad[..., None, :]
        grad_B = (U @ (Vh @ A.double().mT)).to(B.dtype) if ctx.needs_input_grad[0] else None
        grad_A = ((B.double().mT @ U) @ Vh).to(A.dtype) if ctx.needs_input_grad[1] else None
        return grad_B, grad_A


def _singular_values(B: Tensor, A: Tensor) -> Tensor:
    dtype = widened(B.dtype)
    L, M = _triangles(B.to(dtype), A.to(dtype).mT)
    if dtype == torch.float32:  # the float64 product cannot over- or underflow
        sigma: Tensor = torch.linalg.svdvals(L.mT @ M)
        return sigma
    L, left = by_peak(L)
    M, right = by_peak(M)
    sigma = torch.linalg.svdvals(L.mT @ M)
    return sigma * left[..., 0] * right[..., 0]


def _triangles(X: Float[Tensor, "*batch m r"], Y: Float[Tensor, "*batch n r"]) -> tuple[Tensor, Tensor]:
    """Lower triangular L, M in float64 with L Lᵀ = XᵀX and M Mᵀ = YᵀY, so that Lᵀ M has the singular values of X Yᵀ.

    Each factor takes the cheapest way that is accurate: Cholesky of the Gram matrix in its own dtype, Cholesky in
    float64, or QR in float64. Without a look at the data (`may_branch`) it is always QR.
    """
    r = X.shape[-1]
    if not may_branch(X):
        return _qr_triangle(X), _qr_triangle(Y)
    if r > X.shape[-2] or r > Y.shape[-2]:
        return _careful_triangle(X, "B"), _careful_triangle(Y, "A")
    grams = torch.stack((_gram(X), _gram(Y))).double()
    roots, info = torch.linalg.cholesky_ex(grams)
    squares = roots.diagonal(dim1=-2, dim2=-1).square()
    determinants = (squares / (grams.diagonal(dim1=-2, dim2=-1) + _TINY)).prod(-1)
    of_X, of_Y = determinants.view(2, math.prod(X.shape[:-2])).tolist()
    failed = any(info.flatten().tolist())
    L, M = roots.unbind()
    if failed or not _all_at_least(of_X, _DETERMINANT):
        L = L if _conditioned(grams[0], _SMALLEST) else _careful_triangle(X, "B")
    if failed or not _all_at_least(of_Y, _DETERMINANT):
        M = M if _conditioned(grams[1], _SMALLEST) else _careful_triangle(Y, "A")
    return L, M


def _all_at_least(values: list[float], least: float) -> bool:
    """False for NaN."""
    return all(value >= least for value in values)


def _conditioned(gram: Tensor, least: float) -> bool:
    return _all_at_least(_smallest_eigenvalue(gram).flatten().tolist(), least)


def _careful_triangle(X: Tensor, name: str) -> Tensor:
    if X.dtype == torch.float32 and X.shape[-1] <= X.shape[-2]:
        gram = _gram(X.double())
        if _conditioned(gram, _SMALLEST_WIDE):
            root: Tensor = torch.linalg.cholesky_ex(gram).L
            return root
    triangle = _qr_triangle(X)
    _check_finite(triangle, name)
    return triangle


def _qr_triangle(X: Tensor) -> Tensor:
    R: Tensor = torch.linalg.qr(X.double(), mode="r").R
    return R.mT


def _check_finite(triangle: Tensor, name: str) -> None:
    if may_branch(triangle) and not bool(triangle.isfinite().all()):
        raise ValueError(f"`{name}` must be finite; got NaN or infinite entries. Did the training diverge?")


def _gram(X: Float[Tensor, "*batch m r"]) -> Float[Tensor, "*batch r r"]:
    """XᵀX, summed in chunks of rows."""
    *batch, m, r = X.shape
    chunk = _CHUNK[X.dtype]
    blocks = m // chunk
    whole = blocks * chunk
    rows = X if whole == m else X[..., :whole, :]
    chunks = rows.reshape(math.prod(batch) * blocks, chunk, r)
    gram = torch.bmm(chunks.mT, chunks).view(*batch, blocks, r, r).sum(-3)  # torch sums these pairwise
    return gram if whole == m else gram + X[..., whole:, :].mT @ X[..., whole:, :]


def _smallest_eigenvalue(gram: Float[Tensor, "*batch r r"]) -> Float[Tensor, "*batch"]:
    """λ_min(QᵀQ) for the unit columns Q; -1 if columns are not finite, or so small that squares underflow."""
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = gram / norm[..., None] / norm[..., None, :]
    usable = unit.isfinite().all(-1).all(-1) & (norm > _TINY**0.5).all(-1)
    unit = torch.where(usable[..., None, None], unit, 0.0)
    return torch.where(usable, torch.linalg.eigvalsh(unit)[..., 0], -1.0)


def svd(B: Float[Tensor, "*batch d_out r"], A: Float[Tensor, "*batch r d_in"]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of B A, by QR of both factors and an SVD of the r × r core. Orthonormal for any rank."""
    Q, R = torch.linalg.qr(B.double())
    P, T = torch.linalg.qr(A.double().mT)
    _check_finite(R, "B")
    _check_finite(T, "A")
    R, left = by_peak(R)
    T, right = by_peak(T)
    U, S, Vh = torch.linalg.svd(R @ T.mT, full_matrices=False)
    return Q @ U, S * left[..., 0] * right[..., 0], Vh @ P.mT


def inner(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Float[Tensor, "*batch"]:
    """⟨B1 A1, B2 A2⟩ = Σ (B1ᵀ B2) ∘ (A1 A2ᵀ)."""
    left = B1.double().mT @ B2.double()
    right = A1.double() @ A2.double().mT
    return (left * right).sum((-2, -1))
