"""The leading triplets of large weights, against full SVDs."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorakit.lens.static import weight_vectors
from lorakit.lens.static._concentration import concentrated
from lorakit.spectral import _leading
from lorakit.spectral._leading import leading_svd

N, M, RANK = 700, 640, 24


def orthonormal(d, n, seed):
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


@pytest.fixture(scope="module")
def vectors():
    return orthonormal(N, M, 0), orthonormal(M, M, 1)


@pytest.fixture(scope="module")
def base(vectors):
    U, V = vectors
    return (U * torch.arange(1, M + 1, dtype=torch.float64) ** -0.7) @ V.mT * 10


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(weight_vectors, "_SMALL", 64)


def changes(U, V):
    spread = torch.full((M,), M**-0.5, dtype=torch.float64)
    noise = torch.randn(N, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {
        "none of it an intruder": 0.002 * noise,
        "an intruder": 30 * torch.outer(U @ spread, V @ spread),
        "a vector of W far down": 30 * torch.outer(U[:, 500], V[:, 400]),
        "outside of W's range on one side": 30 * torch.outer(U[:, 3], V @ spread),
        "low rank": 3 * noise[:, :4] @ noise[:4],
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(5))
def test_leading_triplets_give_what_full_svds_give(base, vectors, which, dtype, monkeypatch):
    monkeypatch.setattr(_leading, "_LARGEST_SHARE", 0.9)  # these weights are small for float64's tolerance
    change = list(changes(*vectors).values())[which]
    W, tuned = base.to(dtype), (base + change).to(dtype)
    found = weight_vectors._from_leading(W, tuned, RANK, 10, 0.5)
    expected = weight_vectors._from_full(base, base + change, RANK, 10, 0.5)
    assert found is not None
    assert expected["intruders"] == found["intruders"]
    assert expected["input_intruders"] == found["input_intruders"]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    for key, value in expected.items():
        assert numpy.asarray(found[key]) == pytest.approx(numpy.asarray(value), rel=tolerance, abs=tolerance), key


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 4])
def test_the_update_s_numbers_are_those_of_its_full_spectrum(any_size, base, vectors, which):
    change = list(changes(*vectors).values())[which]
    expected = weight_vectors.update_numbers(change, base, 0.9)
    found = weight_vectors.update_numbers(change.float(), base.float(), 0.9, rank=RANK)
    assert found == pytest.approx(expected, rel=1e-4)


def test_triplets_are_numpy_s(base):
    found = leading_svd(base.float(), 12)
    U, S, Vh = numpy.linalg.svd(base.numpy())
    assert found.S.numpy() == pytest.approx(S[:12], rel=1e-5)
    assert numpy.abs((U[:, :12] * found.U.numpy()).sum(0)) == pytest.approx(numpy.ones(12), abs=1e-4)
    assert numpy.abs((Vh[:12] * found.Vh.numpy()).sum(1)) == pytest.approx(numpy.ones(12), abs=1e-4)


def test_more_equal_singular_values_than_a_block_has_columns_are_not_missed(vectors):
    """A Krylov space of 32 random directions holds 32 of 50 equal ones; the rest must not go unnoticed."""
    U, V = vectors
    sigma = torch.linspace(1, 0.1, M, dtype=torch.float64)
    sigma[:50] = 5.0
    found = leading_svd((U * sigma) @ V.mT, 40)
    assert found is None or found.S.numpy() == pytest.approx(numpy.full(40, 5.0))


@pytest.mark.parametrize("W", [torch.zeros(300, 300), torch.eye(300)])
def test_degenerate_weights_give_their_triplets_or_nothing(W):
    found = leading_svd(W, 8)
    if found is not None:
        assert found.S.numpy() == pytest.approx(numpy.linalg.svd(W.numpy(), compute_uv=False)[:8], abs=1e-6)
        assert ((found.U * found.S) @ found.Vh).isfinite().all()


def test_a_weight_of_noise_takes_full_svds(any_size):
    generator = torch.Generator().manual_seed(0)
    W, tuned = (torch.randn(96, 80, generator=generator, dtype=torch.float64) for _ in range(2))
    found = weight_vectors.vector_numbers(W, tuned, rank=16, top_k=5, intruder_below=0.5)
    assert found == weight_vectors._from_full(W, tuned, 16, 5, 0.5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0, 1), below=st.floats(0.2, 0.9))
@example(seed=174, weight=0.65625, below=0.875)  # a narrow peak between two Ritz values
def test_concentration_is_what_the_singular_vectors_say(seed, weight, below):
    """A mixture of one singular vector and noise; close to the limit either answer, or none, will do."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    U, S, _ = torch.linalg.svd(W)
    noise = torch.randn(60, generator=generator, dtype=torch.float64)
    u = weight * U[:, seed % 60] + (1 - weight) * noise / noise.norm()
    u = u / u.norm()
    largest = float((U.mT @ u).abs().max())
    answer = concentrated(W, u[:, None], [below], outside=u.new_empty(60, 0))
    if answer is not None and abs(largest - below) > 1e-6:
        assert answer == [largest >= below]


def test_a_vector_spread_over_many_singular_vectors_is_told_in_few_steps():
    d = 2000
    W = torch.diag(torch.linspace(3, 1, d, dtype=torch.float64))
    spread = torch.full((d, 1), d**-0.5, dtype=torch.float64)
    none = W.new_empty(d, 0)
    assert concentrated(W, spread, [0.5], outside=none) == [False]
    one = torch.zeros(d, 1, dtype=torch.float64)
    one[1234] = 1
    assert concentrated(W, one, [0.5], outside=none) == [True]


def test_what_a_weight_of_low_rank_maps_to_nothing_is_no_singular_vector_of_it():
    U, V = orthonormal(200, 9, 3).float(), orthonormal(200, 8, 4).float()
    W = (U[:, :8] * torch.arange(8.0, 0.0, -1.0)) @ V.mT
    assert concentrated(W, U[:, 8:], [0.5], outside=U[:, :8]) == [False]
