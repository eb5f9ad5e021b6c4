"""Every number against numpy in float64 on the dense product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.spectral import SVD, LowRank

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}
ORTHONORMAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d, r, seed=0):
    return torch.linalg.qr(rand(d, r, seed=seed)).Q


def grade(r, low=-6.0):
    return torch.logspace(0, low, r, dtype=torch.float64)


def graded(d_out, d_in, r, where):
    """A condition number of 1e6 that no scaling of columns removes."""
    U, V = orthonormal(d_out, r, 1), orthonormal(d_in, r, 2)
    mix = orthonormal(r, r, 3)
    B = U * grade(r) @ mix if where in ("B", "both") else U @ mix
    A = mix.mT @ (grade(r)[:, None] * V.mT) if where in ("A", "both") else mix.mT @ V.mT
    return B, A


def kahan(n, angle=1.2):
    s, c = math.sin(angle), math.cos(angle)
    return torch.diag(torch.tensor([s**i for i in range(n)], dtype=torch.float64)) @ (
        torch.eye(n, dtype=torch.float64) - c * torch.ones(n, n, dtype=torch.float64).triu(1)
    )


def nearly_dependent(angle):
    B = orthonormal(600, 8, 4)
    B[:, 1] = math.cos(angle) * B[:, 0] + math.sin(angle) * B[:, 1]
    return B, rand(8, 300, seed=5)


CASES = {
    "random": lambda: (rand(640, 16), rand(16, 520, seed=1)),
    "odd sizes": lambda: (rand(777, 13), rand(13, 301, seed=1)),
    "short": lambda: (rand(33, 8), rand(8, 40, seed=1)),
    "square": lambda: (rand(12, 12), rand(12, 12, seed=1)),
    "nonnegative": lambda: (rand(640, 16).abs(), rand(16, 520, seed=1).abs()),
    "graded in B": lambda: graded(600, 500, 8, "B"),
    "graded in A": lambda: graded(600, 500, 8, "A"),
    "graded in both": lambda: graded(600, 500, 8, "both"),
    "aligned grades cancel": lambda: (
        orthonormal(600, 8, 1) * grade(8),
        grade(8).flip(0)[:, None] * orthonormal(500, 8, 2).mT,
    ),
    "mixed column scales": lambda: (rand(600, 8) * grade(8, -9), rand(8, 500, seed=1) * grade(8, 5)[:, None]),
    "rank-deficient": lambda: (rand(600, 4) @ rand(4, 12, seed=2), rand(12, 500, seed=1)),
    "equal columns": lambda: (rand(600, 1).expand(600, 6).clone(), rand(6, 500, seed=1)),
    "zero B": lambda: (torch.zeros(600, 8, dtype=torch.float64), rand(8, 500)),
    "zero": lambda: (torch.zeros(600, 8, dtype=torch.float64), torch.zeros(8, 500, dtype=torch.float64)),
    "zero column": lambda: (rand(600, 8) * torch.tensor([1.0] * 7 + [0.0]).double(), rand(8, 500, seed=1)),
    "r above d_out": lambda: (rand(5, 12), rand(12, 300, seed=1)),
    "r above d_in": lambda: (rand(300, 12), rand(12, 5, seed=1)),
    "r above both": lambda: (rand(6, 40), rand(40, 9, seed=1)),
    "one row": lambda: (rand(1, 4), rand(4, 300, seed=1)),
    "one column": lambda: (rand(300, 4), rand(4, 1, seed=1)),
    "one by one": lambda: (rand(1, 1), rand(1, 1, seed=1)),
    "r = 1": lambda: (rand(600, 1), rand(1, 500, seed=1)),
    "constant": lambda: (torch.full((4096, 1), 0.1).double(), torch.full((1, 300), 0.3).double()),
    "signs": lambda: (0.1 * rand(4096, 16).sign(), 0.7 * rand(16, 512, seed=1).sign()),
    "kahan": lambda: (orthonormal(600, 24, 1) @ kahan(24), rand(24, 500, seed=1)),
    "tiny and huge": lambda: (1e-25 * rand(600, 8), 1e25 * rand(8, 500, seed=1)),
    "huge and tiny": lambda: (1e25 * rand(600, 8), 1e-25 * rand(8, 500, seed=1)),
    "tiny": lambda: (1e-16 * rand(600, 8), 1e-16 * rand(8, 500, seed=1)),
    "sparse": lambda: (rand(600, 8) * (rand(600, 8, seed=7) > 2), rand(8, 500, seed=1)),
    **{f"columns 1e-{k} apart": (lambda k=k: nearly_dependent(10.0**-k)) for k in range(1, 9)},
    "batch": lambda: (rand(3, 2, 300, 8), rand(3, 2, 8, 200, seed=1)),
    "batch, some hard": lambda: (
        torch.stack([rand(600, 8), graded(600, 500, 8, "B")[0], torch.zeros(600, 8).double()]),
        rand(3, 8, 500, seed=1),
    ),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def dense(B, A, scaling=1.0):
    return scaling * (B.double().numpy() @ A.double().numpy())


def reference(B, A, scaling=1.0):
    sigma = np.linalg.svd(dense(B, A, scaling), compute_uv=False)
    return sigma[..., : min(B.shape[-2], B.shape[-1], A.shape[-1])]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_singular_values_and_svd_match_numpy(case, dtype):
    B, A = (factor.to(dtype) for factor in CASES[case]())
    update = LowRank(B, A, -2.5)
    expected = reference(B, A, -2.5)
    tolerance = TOLERANCE[dtype] * expected.max(-1, keepdims=True)
    sigma = update.singular_values()
    assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (np.abs(sigma.double().numpy() - expected) <= tolerance).all()
    assert (sigma[..., :-1] >= sigma[..., 1:]).all()
    assert (sigma >= 0).all()

    U, S, Vh = update.svd()
    m = expected.shape[-1]
    assert (U.shape, Vh.shape) == ((*B.shape[:-1], m), (*A.shape[:-2], m, A.shape[-1]))
    assert (np.abs(S.double().numpy() - expected) <= tolerance).all()
    eye = torch.eye(m, dtype=U.dtype)
    assert (U.mT @ U - eye).abs().max() <= ORTHONORMAL[dtype]
    assert (Vh @ Vh.mT - eye).abs().max() <= ORTHONORMAL[dtype]
    rebuilt = (U.double() * S.double()[..., None, :] @ Vh.double()).numpy()
    assert np.abs(rebuilt - dense(B, A, -2.5)).max() <= 10 * tolerance.max()


@pytest.mark.parametrize("shape", [(4096, 16, 14336), (1024, 64, 4096)])
def test_singular_values_at_model_size(shape):
    d_out, r, d_in = shape
    B, A = rand(d_out, r).float(), rand(r, d_in, seed=1).float()
    R = np.linalg.qr(B.double().numpy(), mode="r") @ np.linalg.qr(A.double().numpy().T, mode="r").T
    expected = np.linalg.svd(R, compute_uv=False)
    assert np.abs(LowRank(B, A).singular_values().double().numpy() - expected).max() <= 5e-7 * expected[0]


def test_what_cancels_between_mixed_factors_stays_exact_in_float32():
    mix = orthonormal(8, 8, 3)
    B = (orthonormal(600, 8, 1) * grade(8) @ mix).float()
    A = (mix.mT @ (grade(8).flip(0)[:, None] * orthonormal(500, 8, 2).mT)).float()
    expected = reference(B, A)
    assert np.abs(LowRank(B, A).singular_values().double().numpy() - expected).max() <= 1e-6 * expected[0]


def test_parameters_and_strided_factors_take_the_same_path():
    B, A = rand(600, 8).float(), rand(8, 500, seed=1).float()
    expected = LowRank(B, A).singular_values()
    parameters = LowRank(torch.nn.Parameter(B), torch.nn.Parameter(A)).singular_values()
    strided = LowRank(B.mT.contiguous().mT, A.mT.contiguous().mT).singular_values()
    torch.testing.assert_close(parameters.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(strided, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
def test_empty_updates_are_defined(batch, r):
    update = LowRank(torch.zeros(*batch, 5, r), torch.zeros(*batch, r, 4), 2.0)
    assert update.singular_values().shape == (*batch, r)
    assert [tuple(p.shape) for p in update.svd()] == [(*batch, 5, r), (*batch, r), (*batch, r, 4)]
    for value in (update.frobenius_norm(), update.spectral_norm(), update.inner(update), update.cosine(update)):
        assert value.shape == batch
        assert (value == 0).all()
    assert update.truncate(2).shape == (*batch, 5, 4)
    assert update.compress().rank == 0
    assert (update + update).rank == 2 * r
    assert not update.dense().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_factors_truncate_and_rebuild_without_nan(dtype):
    update = LowRank(torch.zeros(6, 3, dtype=dtype), torch.zeros(3, 5, dtype=dtype))
    assert not update.truncate(2).dense().any()
    assert update.cosine(update) == 0
    assert update.numerical_rank() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["B", "A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [1, 4, 60])
def test_non_finite_factors_are_refused(bad, name, dtype, r):
    factors = {"B": rand(50, r).to(dtype), "A": rand(r, 40).to(dtype)}
    factors[name][0, 0] = bad
    for method in ("singular_values", "svd"):
        with pytest.raises(ValueError, match=f"`{name}` must be finite"):
            getattr(LowRank(**factors), method)()


@pytest.mark.parametrize(
    ("B", "A", "scaling", "error", "message"),
    [
        ([[1.0]], torch.ones(1, 1), 1.0, TypeError, "`B` must be a real floating-point tensor; got list"),
        (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64), 1.0, TypeError, "`A` must be .* got torch.int64"),
        (torch.ones(2, 2), torch.ones(2, 2).double(), 1.0, TypeError, "must have one dtype; got torch.float32 and"),
        (torch.ones(2, 2), torch.ones(2, 2, device="meta"), 1.0, ValueError, "must be on one device"),
        (torch.ones(2, 3), torch.ones(2, 3), 1.0, ValueError, r"got \(2, 3\) and \(2, 3\). Is one of them transposed"),
        (torch.ones(2), torch.ones(2), 1.0, ValueError, "must have shapes"),
        (torch.ones(3, 2, 2), torch.ones(2, 2), 1.0, ValueError, "same batch"),
        (torch.ones(0, 2), torch.ones(2, 2), 1.0, ValueError, "d_out, d_in >= 1"),
        (torch.ones(2, 2), torch.ones(2, 2), math.nan, ValueError, "`scaling` must be finite; got nan"),
        (torch.ones(2, 2), torch.ones(2, 2), "2", TypeError, "`scaling` must be a number or a tensor; got str"),
        (torch.ones(2, 2), torch.ones(2, 2), torch.ones(3), ValueError, r"batch shape \(\); got shape \(3,\)"),
        (torch.ones(2, 2), torch.ones(2, 2), torch.tensor(1), TypeError, "`scaling` must be real and floating"),
    ],
)
def test_construction_errors(B, A, scaling, error, message):
    with pytest.raises(error, match=message):
        LowRank(B, A, scaling)


def test_method_errors():
    update = LowRank(rand(6, 2), rand(2, 5))
    with pytest.raises(ValueError, match="`rank` must be at least 0; got -1"):
        update.truncate(-1)
    with pytest.raises(TypeError, match="`rank` must be an integer; got float"):
        update.truncate(1.0)
    with pytest.raises(ValueError, match="`rtol` must be in"):
        update.compress(rtol=2.0)
    with pytest.raises(ValueError, match=r"same d_out and d_in, \(6, 5\); got \(5, 6\)"):
        update.inner(LowRank(rand(5, 2), rand(2, 6)))
    with pytest.raises(ValueError, match="batch that broadcasts"):
        LowRank(rand(2, 6, 2), rand(2, 2, 5)).add(LowRank(rand(3, 6, 2), rand(3, 2, 5)))
    with pytest.raises(TypeError, match="`other` must be a LowRank; got Tensor"):
        update.add(rand(6, 5))
    with pytest.raises(ValueError, match="`items` must have at least one LowRank"):
        LowRank.sum([])
    with pytest.raises(ValueError, match="Is `Vh` transposed"):
        LowRank.from_svd(rand(6, 2), rand(2), rand(5, 2))
    with pytest.raises(TypeError, match="`S` must be a real floating-point"):
        LowRank.from_svd(rand(6, 2), torch.ones(2, dtype=torch.int64), rand(2, 5))


@pytest.mark.parametrize("scaling", [2.0, -0.5, 0.0, torch.tensor([2.0, -0.5, 0.0])], ids=str)
def test_scaling_numbers_and_tensors(scaling):
    B, A = rand(3, 9, 4), rand(3, 4, 7, seed=1)
    update = LowRank(B, A, scaling)
    factors = torch.as_tensor(scaling).double().expand(3)
    product = factors[:, None, None].numpy() * (B.numpy() @ A.numpy())
    np.testing.assert_allclose(update.dense().numpy(), product, atol=1e-14)
    np.testing.assert_allclose(
        update.singular_values().numpy(), np.linalg.svd(product, compute_uv=False)[:, :4], atol=1e-13
    )
    U, S, Vh = update.svd()
    assert (S >= 0).all()
    np.testing.assert_allclose((U * S[:, None] @ Vh).numpy(), product, atol=1e-13)
    rebuilt = LowRank.from_svd(U, S, Vh, scaling)
    np.testing.assert_allclose(rebuilt.dense().numpy(), product, atol=1e-13)
    norms = torch.linalg.vector_norm(rebuilt.B, dim=-2), torch.linalg.vector_norm(rebuilt.A, dim=-1)
    torch.testing.assert_close(*norms)  # balanced
    np.testing.assert_allclose((update + LowRank(B, A)).dense().numpy(), product + B.numpy() @ A.numpy(), atol=1e-13)
    np.testing.assert_allclose(update.inner(LowRank(B, A)).numpy(), (product * (B @ A).numpy()).sum((1, 2)), atol=1e-11)
    assert (update.cosine(LowRank(B, A)) - factors.sign()).abs().max() < 1e-12


def test_from_svd_takes_signed_values_and_half_precision():
    U, Vh = orthonormal(6, 2).bfloat16(), orthonormal(5, 2).mT.bfloat16()
    S = torch.tensor([2.0, -1.0]).bfloat16()
    update = LowRank.from_svd(U, S, Vh, -2.0)
    assert update.dtype == torch.float32
    torch.testing.assert_close(update.dense(), (U.float() * S.float()) @ Vh.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["random", "graded in both", "rank-deficient", "r above both", "tiny and huge"])
def test_truncation_is_optimal(case, dtype):
    B, A = (factor.to(dtype) for factor in CASES[case]())
    expected = reference(B, A)
    product = dense(B, A)
    for rank in (0, 1, 3, 100):
        kept = LowRank(B, A).truncate(rank)
        assert kept.rank == min(rank, len(expected))
        tail = np.sqrt((expected[rank:] ** 2).sum())
        missed = np.linalg.norm(product - dense(kept.B, kept.A))
        assert abs(missed - tail) <= 20 * TOLERANCE[dtype] * np.linalg.norm(product)


def test_truncation_where_the_singular_values_overflow_float32_keeps_finite_factors():
    kept = LowRank((1e25 * rand(60, 4)).float(), (1e25 * rand(4, 50, seed=1)).float()).truncate(2)
    assert kept.B.isfinite().all()
    assert kept.A.isfinite().all()


def test_compress_finds_the_rank():
    update = LowRank(rand(60, 3) @ rand(3, 9, seed=1), rand(9, 50, seed=2))
    assert update.numerical_rank() == 3
    assert update.compress().rank == 3
    torch.testing.assert_close(update.compress().dense(), update.dense())
    assert update.compress(rtol=0.999).rank == 1
    assert (update - update).compress().rank == 0
    zero = LowRank(rand(2, 60, 3), rand(2, 3, 50), torch.tensor([1.0, 0.0]))
    assert zero.numerical_rank().tolist() == [3, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_inner_and_cosine(dtype):
    B, A, C, D = (x.to(dtype) for x in (rand(60, 4), rand(4, 50, seed=1), rand(60, 7, seed=2), rand(7, 50, seed=3)))
    a, b = LowRank(B, A, 0.5), LowRank(C, D, -3.0)
    x, y = dense(B, A, 0.5), dense(C, D, -3.0)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert a.frobenius_norm().item() == pytest.approx(np.linalg.norm(x), rel=rtol)
    assert a.spectral_norm().item() == pytest.approx(np.linalg.norm(x, 2), rel=rtol)
    assert a.inner(b).item() == pytest.approx((x * y).sum(), rel=rtol, abs=rtol * np.linalg.norm(x))
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert a.cosine(b).item() == pytest.approx(cosine, abs=rtol)
    assert a.cosine(a * -2.0).item() == pytest.approx(-1.0, abs=rtol)


@pytest.mark.parametrize(("left", "right"), [(1e-25, 1e25), (1e-20, 1e-20), (1e18, 1e18)])
def test_norms_and_cosine_do_not_overflow(left, right):
    B, A = (left * rand(60, 4)).float(), (right * rand(4, 50, seed=1)).float()
    update = LowRank(B, A)
    assert update.cosine(update).item() == pytest.approx(1.0, abs=1e-6)
    if left * right >= 1e-38:
        assert update.frobenius_norm().item() == pytest.approx(np.linalg.norm(dense(B, A)), rel=1e-6)


def test_float64_extremes():
    B, A = rand(60, 4), rand(4, 50, seed=1)
    expected = reference(B, A)
    sigma = LowRank(1e200 * B, 1e-190 * A).singular_values().numpy()
    np.testing.assert_allclose(sigma, 1e10 * expected, rtol=1e-12)
    np.testing.assert_allclose(LowRank(1e200 * B, 1e-190 * A).svd().S.numpy(), 1e10 * expected, rtol=1e-12)
    assert LowRank(1e-200 * B, A).cosine(LowRank(1e-200 * B, A)).item() == pytest.approx(1.0)


def test_sum_and_concatenation():
    items = [LowRank(rand(8, 3, seed=i), rand(3, 6, seed=9 + i), s) for i, s in enumerate((1.0, -2.0, 0.5))]
    expected = sum(dense(i.B, i.A, i.scaling) for i in items)
    total = items[0].add(*items[1:])
    assert total.rank == 9
    np.testing.assert_allclose(total.dense().numpy(), expected, atol=1e-12)
    compressed = LowRank.sum(items)
    assert compressed.rank == 6
    np.testing.assert_allclose(compressed.dense().numpy(), expected, atol=1e-12)
    tail = np.linalg.svd(expected, compute_uv=False)[2:]
    missed = np.linalg.norm(LowRank.sum(items, rank=2).dense().numpy() - expected)
    assert missed == pytest.approx(np.linalg.norm(tail))
    np.testing.assert_allclose(
        (items[0] - items[1] * 2.0).dense().numpy(),
        dense(items[0].B, items[0].A) - 2 * dense(items[1].B, items[1].A, -2.0),
        atol=1e-12,
    )
    same = LowRank(rand(8, 2).bfloat16(), rand(2, 6).bfloat16(), 4.0)
    assert ((same + same).dtype, (same + same).scaling) == (torch.bfloat16, 4.0)
    assert (same + same * 2.0).dtype == torch.float32
    broadcast = items[0] + LowRank(rand(5, 8, 2), rand(5, 2, 6))
    assert broadcast.shape == (5, 8, 6)


def test_update_is_frozen_and_describes_itself():
    update = LowRank(rand(3, 8, 2), rand(3, 2, 6), 2.0)
    assert (update.shape, update.rank, update.dtype) == ((3, 8, 6), 2, torch.float64)
    assert update.to(dtype=torch.float32).dtype == torch.float32
    assert update.device == torch.device("cpu")
    assert isinstance(update.svd(), SVD)
    with pytest.raises(AttributeError):
        update.scaling = 1.0


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [((7, 3), (3, 6)), ((2, 7, 3), (2, 3, 6)), ((3, 8), (8, 5)), ((1, 2), (2, 4))])
def test_singular_value_gradients(shapes):
    B, A = (rand(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    scaling = (1 + rand(1, *shapes[0][:-2], seed=5)[0].abs()).requires_grad_()
    for sign in (1.0, -1.0):
        assert torch.autograd.gradcheck(lambda b, a, s, g=sign: LowRank(b, a, g * s).singular_values(), (B, A, scaling))
    assert torch.autograd.gradcheck(lambda b, a: LowRank(b, a, -2.0).frobenius_norm(), (B, A))


def test_svd_gradients_of_independent_factors():
    B, A = rand(7, 3).requires_grad_(), rand(3, 6, seed=1).requires_grad_()

    def projectors(b, a):
        U, S, Vh = LowRank(b, a, 0.5).svd()
        return U[:, :1] @ U[:, :1].mT, S, Vh[:1].mT @ Vh[:1]

    assert torch.autograd.gradcheck(projectors, (B, A))
    assert torch.autograd.gradcheck(
        lambda b, a: LowRank(b, a).inner(LowRank(a.mT, b.mT)),
        (rand(5, 2).requires_grad_(), rand(2, 5).requires_grad_()),
    )


@pytest.mark.parametrize("case", ["zero", "zero B", "rank-deficient", "equal columns", "r above both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_finite_where_there_is_no_derivative(case, dtype):
    B, A = (factor.to(dtype).requires_grad_() for factor in CASES[case]())
    update = LowRank(B, A)
    (update.singular_values().sum() + update.frobenius_norm()).backward()
    assert B.grad.isfinite().all()
    assert A.grad.isfinite().all()
    assert B.grad.dtype == dtype


def test_gradient_in_float32_matches_the_dense_one():
    B, A = rand(60, 4).float().requires_grad_(), rand(4, 50, seed=1).float().requires_grad_()
    LowRank(B, A, 2.0).singular_values().sum().backward()
    b, a = B.detach().double().requires_grad_(), A.detach().double().requires_grad_()
    torch.linalg.matrix_norm(2.0 * b @ a, "nuc").backward()
    torch.testing.assert_close(B.grad, b.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(A.grad, a.grad.float(), rtol=1e-5, atol=1e-5)


def exercise(update):
    other = update * 2.0
    parts = [update.singular_values(), *update.svd(), update.frobenius_norm(), update.spectral_norm()]
    parts += [update.inner(other), update.cosine(other), update.dense(), update.numerical_rank()]
    parts += [update.truncate(2).B, (update + other).A, LowRank.sum([update, other], rank=3).B]
    return [tuple(part.shape) for part in parts]


SHAPES = [((9, 3), (3, 7)), ((2, 9, 3), (2, 3, 7)), ((4, 9), (9, 5)), ((0, 9, 3), (0, 3, 7))]


@pytest.mark.slow
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_the_cpu_nothing_looks_at_the_data(shapes, dtype):
    """The meta device has none: any .item(), bool() or copy to the host would raise."""
    expected = exercise(LowRank(*(torch.ones(s, dtype=dtype) for s in shapes), 2.0))
    for scaling in (2.0, torch.ones(shapes[0][:-2], device="meta")):
        assert exercise(LowRank(*(torch.ones(s, dtype=dtype, device="meta") for s in shapes), scaling)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("shapes", SHAPES)
def test_fake_tensors_propagate(shapes):
    expected = exercise(LowRank(*(torch.ones(s) for s in shapes), 2.0))
    with FakeTensorMode():
        B, A = (torch.ones(s) for s in shapes)
        assert exercise(LowRank(B, A, 2.0)) == expected
        assert exercise(LowRank(torch.nn.Parameter(B), torch.nn.Parameter(A), 2.0)) == expected


def test_branch_free_path_agrees(monkeypatch):
    import lorakit.spectral._product as product

    monkeypatch.setattr(product, "may_branch", lambda X: False)
    for case in ("random", "graded in both", "zero", "r above both", "batch, some hard"):
        B, A = (factor.float() for factor in CASES[case]())
        expected = reference(B, A)
        error = np.abs(LowRank(B, A).singular_values().double().numpy() - expected)
        assert (error <= 1e-6 * expected.max(-1, keepdims=True)).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_matches_numpy_without_waiting(dtype):
    B, A = (factor.to(dtype) for factor in CASES["batch, some hard"]())
    expected = reference(B, A, 2.0)
    update = LowRank(B.cuda(), A.cuda(), 2.0)
    update.singular_values()
    sigma = update.singular_values().double().cpu().numpy()
    assert (np.abs(sigma - expected) <= TOLERANCE[dtype] * expected.max(-1, keepdims=True)).all()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 40))


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 99), st.floats(-3, 3), st.sampled_from([torch.float32, torch.float64]))
def test_any_shape_matches_numpy(size, seed, scaling, dtype):
    d_out, r, d_in = size
    B, A = rand(d_out, r, seed=seed).to(dtype), rand(r, d_in, seed=seed + 1).to(dtype)
    expected = reference(B, A, scaling)
    error = np.abs(LowRank(B, A, scaling).singular_values().double().numpy() - expected)
    assert error.max() <= TOLERANCE[dtype] * expected[0] + 1e-30


@settings(deadline=None, max_examples=25)
@given(sizes, st.integers(0, 99))
def test_the_choice_of_factors_does_not_matter(size, seed):
    d_out, r, d_in = size
    B, A = rand(d_out, r, seed=seed), rand(r, d_in, seed=seed + 1)
    gauge = orthonormal(r, r, seed + 2) * torch.linspace(1, 3, r, dtype=torch.float64)
    other = LowRank(B @ gauge, torch.linalg.solve(gauge, A))
    sigma = LowRank(B, A).singular_values()
    torch.testing.assert_close(other.singular_values(), sigma, rtol=1e-10, atol=1e-10 * sigma[0].item())


@settings(deadline=None, max_examples=25)
@given(sizes, st.integers(0, 99), st.floats(-3, 3), st.floats(-3, 3))
def test_the_inner_product_is_bilinear_and_symmetric(size, seed, p, q):
    d_out, r, d_in = size
    a, b, c = (LowRank(rand(d_out, k, seed=seed + k), rand(k, d_in, seed=seed + 50 + k)) for k in (r, r + 1, r + 2))
    left = (a * p + b * q).inner(c)
    torch.testing.assert_close(left, p * a.inner(c) + q * b.inner(c), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.inner(b), b.inner(a))
    torch.testing.assert_close(a.inner(a), a.frobenius_norm() ** 2)
