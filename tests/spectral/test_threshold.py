"""The optimal hard threshold against the values of Gavish and Donoho and against random matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorakit.spectral import hard_threshold_coefficient, hard_threshold_rank, threshold


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_omega_is_near_the_paper_s_polynomial(beta):
    polynomial = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43  # Eq. 5, stated accurate to 0.02
    assert hard_threshold_coefficient(beta) == pytest.approx(polynomial, abs=0.02)


def test_omega_of_square_matrices_is_the_paper_s_value():
    assert round(hard_threshold_coefficient(1.0), 3) == 2.858


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_median_is_that_of_a_random_matrix(beta):
    """ω(β) is λ(β) over the median singular value of noise of variance 1 / n."""
    n = 1000
    noise = np.random.default_rng(0).standard_normal((int(beta * n), n)) / np.sqrt(n)
    known = np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1)))
    expected = known / np.median(np.linalg.svd(noise, compute_uv=False))
    assert hard_threshold_coefficient(beta) == pytest.approx(expected, rel=5e-3)


def test_the_rank_counts_what_stands_out():
    sigma = torch.tensor([[9.0, 8.0, 1, 1, 1, 1, 1], [1.0] * 7, [0.0] * 7], dtype=torch.float64)
    assert hard_threshold_rank(sigma).tolist() == [2, 0, 0]
    assert hard_threshold_rank(1e-12 * sigma).tolist() == [2, 0, 0]


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_other_shapes_are_refused(beta):
    with pytest.raises(ValueError, match="`beta`"):
        hard_threshold_coefficient(beta)


def test_the_constant_for_square_matrices_is_what_the_integral_gives():
    assert hard_threshold_coefficient(1.0) == pytest.approx(threshold._coefficient(1.0), rel=1e-12)
