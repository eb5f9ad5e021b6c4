from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.spectral import (
    LowRank,
    gradient_overlap,
    leading_similarity,
    principal_angles,
    principal_cosines,
    random_subspace_overlap,
    random_update_cosine,
    residual_ratio,
    subspace_overlap,
    topk_overlap,
    update_cosine,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(d, k, seed=0):
    return torch.linalg.qr(rand(d, k, seed=seed)).Q


PAIRS = {
    "principal_cosines": principal_cosines,
    "principal_angles": principal_angles,
    "subspace_overlap": subspace_overlap,
    "topk_overlap": lambda a, b: topk_overlap(a, b, 1),
    "leading_similarity": leading_similarity,
}


def test_principal_cosines_angles_and_overlap_match_numpy():
    a, b = basis(30, 4), basis(30, 7, seed=1)
    expected = np.linalg.svd(a.numpy().T @ b.numpy(), compute_uv=False)
    np.testing.assert_allclose(principal_cosines(a, b), expected, atol=1e-13)
    np.testing.assert_allclose(principal_angles(a, b), np.arccos(expected), atol=1e-12)
    np.testing.assert_allclose(principal_angles(b, a), np.arccos(expected), atol=1e-12)
    assert subspace_overlap(a, b).item() == pytest.approx((expected**2).mean())
    assert leading_similarity(a, b).item() == pytest.approx(abs(a[:, 0].numpy() @ b[:, 0].numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("angle", [0.0, 1e-5, 1e-3, 0.5, 1.5, math.pi / 2])
def test_principal_angles_of_tilted_planes(angle, dtype):
    q = basis(20, 4)
    a = q[:, :2].to(dtype)
    b = torch.stack([q[:, 0], math.cos(angle) * q[:, 1] + math.sin(angle) * q[:, 2]], -1).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(principal_angles(a, b).double(), [0, angle], atol=tolerance)


@pytest.mark.parametrize(("k_a", "k_b"), [(3, 3), (2, 3), (3, 1)])
def test_principal_angles_of_subspaces_that_fill_the_space(k_a, k_b):
    angles = principal_angles(basis(3, k_a), basis(3, k_b, seed=1))
    assert angles.shape == (min(k_a, k_b),)
    assert angles.isfinite().all()
    if max(k_a, k_b) == 3:
        assert (angles < 1e-12).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 5))
def test_overlaps_do_not_depend_on_the_basis_and_stay_in_range(seed, k_a, k_b):
    a, b = basis(12, k_a, seed), basis(12, k_b, seed + 1)
    turned = a @ basis(k_a, k_a, seed + 2)
    torch.testing.assert_close(subspace_overlap(turned, b), subspace_overlap(a, b))
    torch.testing.assert_close(principal_cosines(turned, b), principal_cosines(a, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(subspace_overlap(a, b), subspace_overlap(b, a))
    assert 0 <= subspace_overlap(a, b) <= 1
    assert subspace_overlap(turned, a).item() == pytest.approx(1.0)


def test_random_subspace_overlap_is_the_mean_over_random_subspaces():
    mean = np.mean([subspace_overlap(basis(24, 3, i), basis(24, 6, 10_000 + i)).item() for i in range(1500)])
    assert mean == pytest.approx(random_subspace_overlap(24, 3, 6), rel=0.03)
    with pytest.raises(ValueError, match="`k_a` and `k_b` must be between 1 and `d`; got 5, 1 and d = 4"):
        random_subspace_overlap(4, 5, 1)


def test_topk_overlap_is_the_papers_formula():
    a, b = basis(30, 6), basis(30, 8, seed=1)
    expected = np.linalg.norm(a[:, :4].numpy().T @ b[:, :4].numpy()) ** 2 / 4
    assert topk_overlap(a, b, 4).item() == pytest.approx(expected)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"`k` must be between 1 and 6.*got {k}"):
            topk_overlap(a, b, k)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_batch_broadcast_promote_and_refuse(name):
    function = PAIRS[name]
    a, b = torch.stack([basis(9, 3, i) for i in range(2)]), basis(9, 2, seed=5)
    batched = function(a, b)
    torch.testing.assert_close(batched, torch.stack([function(x, b) for x in a]))
    assert function(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert function(a.to("meta"), b.to("meta")).shape == batched.shape
    with pytest.raises(ValueError, match=r"must lie in the same space.*got 9 and 8"):
        function(a, basis(8, 2))
    with pytest.raises(ValueError, match=r"must have shape \(\*batch, d, k\) with k >= 1; got \(9, 0\)"):
        function(b[:, :0], b)
    with pytest.raises(TypeError, match=r"must be a real floating-point tensor; got torch\.int64"):
        function(b, b.long())


def test_update_cosine_matches_numpy():
    a, b = LowRank(rand(8, 2), rand(2, 6), 0.5), LowRank(rand(8, 3, seed=1), rand(3, 6, seed=2), -2.0)
    x, y = 0.5 * (a.B @ a.A).numpy(), -2.0 * (b.B @ b.A).numpy()
    assert update_cosine(a, b).item() == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert update_cosine(a, a).item() == pytest.approx(1.0)
    assert update_cosine(a, a * -3.0).item() == pytest.approx(-1.0)
    assert update_cosine(a, a * 0.0) == 0
    assert update_cosine(a, LowRank(torch.zeros(8, 2).double(), rand(2, 6))) == 0


def test_random_update_cosine_is_the_root_mean_square_for_any_spectra():
    n, d_out, d_in = 4000, 7, 5
    rotated = [
        torch.linalg.qr(rand(n, d, r, seed=s)).Q
        for s, (d, r) in enumerate([(d_out, 2), (d_in, 2), (d_out, 3), (d_in, 3)])
    ]
    a = LowRank(rotated[0] * torch.tensor([5.0, 1.0]).double(), rotated[1].mT)
    b = LowRank(rotated[2] * torch.tensor([3.0, 2.0, 0.1]).double(), rotated[3].mT)
    rms = update_cosine(a, b).square().mean().sqrt().item()
    assert rms == pytest.approx(random_update_cosine(d_out, d_in), rel=0.05)
    with pytest.raises(ValueError, match="must be at least 1; got 0 and 3"):
        random_update_cosine(0, 3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradient_overlap(scale):
    G, U, V = rand(9, 7), basis(9, 3), basis(7, 2, seed=1)
    expected = np.linalg.norm(U.numpy().T @ G.numpy() @ V.numpy()) / np.linalg.norm(G.numpy())
    actual = gradient_overlap((scale * G).float(), U.float(), V.mT.float())
    assert actual.item() == pytest.approx(expected, rel=1e-5)
    assert gradient_overlap(U @ V.mT[[0, 1, 0]], U, V.mT).item() == pytest.approx(1.0)
    assert gradient_overlap(torch.zeros(9, 7), U.float(), V.mT.float()) == 0
    with pytest.raises(ValueError, match="Is `Vh` transposed"):
        gradient_overlap(G, U, V)


def test_residual_ratio_survives_cancellation():
    low_rank = LowRank(rand(2500, 3), rand(3, 20, seed=1), 2.0)
    noise = rand(2500, 20, seed=2)
    full = low_rank.dense() + 1e-9 * noise
    expected = np.linalg.norm(full.numpy() - 2.0 * low_rank.B.numpy() @ low_rank.A.numpy()) / np.linalg.norm(full)
    assert residual_ratio(full, low_rank).item() == pytest.approx(expected, rel=1e-5)
    assert residual_ratio(noise, low_rank * 0.0).item() == pytest.approx(1.0)
    assert residual_ratio(0 * full, low_rank) == math.inf
    assert residual_ratio(0 * full, low_rank * 0.0) == 0
    with pytest.raises(ValueError, match=r"`full` must have the shape \(2500, 20\)"):
        residual_ratio(full.mT, low_rank)


def test_residual_ratio_batches():
    low_rank = LowRank(rand(3, 8, 2), rand(3, 2, 6), torch.tensor([1.0, 2.0, 0.5]))
    full = rand(3, 8, 6, seed=4)
    missed = np.linalg.norm((full - low_rank.dense()).numpy(), axis=(1, 2))
    np.testing.assert_allclose(residual_ratio(full, low_rank), missed / np.linalg.norm(full.numpy(), axis=(1, 2)))
    assert residual_ratio(full.to("meta"), low_rank.to(device="meta")).shape == (3,)
