"""Spectra from Gram matrices, against numpy's SVD of ΔW formed in full, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.spectral.gram import svd_from_grams


def grams(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return B.double().mT @ B.double(), A.double() @ A.double().mT


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([(), (3,), (2, 2)]),
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    r=st.integers(1, 6),
    scaling=st.sampled_from([1.0, 2.0, -0.5]),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    decades=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_against_the_update_formed_in_full(batch, d_out, d_in, r, scaling, size, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    grade = torch.logspace(0, -decades, r, dtype=torch.float64)
    B = torch.randn(*batch, d_out, r, dtype=torch.float64, generator=generator) * grade * size
    A = torch.randn(*batch, r, d_in, dtype=torch.float64, generator=generator)
    S, X, Y = svd_from_grams(*grams(B, A), scaling)
    update = scaling * (B @ A).numpy()
    expected = np.linalg.svd(update, compute_uv=False)
    expected = np.pad(expected, [(0, 0)] * len(batch) + [(0, max(0, r - expected.shape[-1]))])[..., :r]
    peak = expected[..., :1]
    assert (np.abs(S.numpy() - expected) <= 1e-7 * peak).all()
    U, V = (B @ X).numpy(), (A.mT @ Y).numpy()
    assert np.abs(U * S.numpy()[..., None, :] @ np.swapaxes(V, -1, -2) - update).max() <= 2e-7 * peak.max()
    for basis in (U, V):
        inner = np.swapaxes(basis, -1, -2) @ basis
        well = expected > 1e-4 * peak  # what is graded below is orthogonal to its neighbours only so far
        mask = (well[..., :, None] & well[..., None, :]).astype(float)
        assert np.abs((inner - np.eye(r)) * mask).max() <= 1e-6


def test_a_batch_of_scalings():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(3, 5, 2, generator=generator), torch.randn(3, 2, 4, generator=generator)
    scaling = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    whole = svd_from_grams(*grams(B, A), scaling)
    for i in range(3):
        one = svd_from_grams(*grams(B[i], A[i]), float(scaling[i]))
        torch.testing.assert_close(whole.S[i], one.S)


def test_components_that_are_rounding_have_no_directions():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 4, generator=generator), torch.randn(4, 7, generator=generator)
    A[3] = A[2]
    S, X, Y = svd_from_grams(*grams(B, A))
    assert S[3] <= 1e-7 * S[0]
    assert not X[:, 3].any()
    assert not Y[:, 3].any()
    torch.testing.assert_close(
        (B.double() @ X).mT @ (B.double() @ X), torch.diag(torch.tensor([1.0, 1, 1, 0]).double())
    )


def test_zero_and_non_finite_updates():
    gram = torch.eye(3).expand(3, 3, 3).clone()
    of_B = torch.stack([torch.zeros(3, 3), torch.eye(3), torch.full((3, 3), torch.nan)])
    S, X, Y = svd_from_grams(of_B, gram)
    assert S[0].tolist() == [0, 0, 0]
    assert S[1].tolist() == pytest.approx([1, 1, 1])
    assert S[2].isnan().all()
    assert not X[0].any()
    assert X.isfinite().all()
    assert Y.isfinite().all()
