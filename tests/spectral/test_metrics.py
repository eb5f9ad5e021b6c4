from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closeness import assert_close_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.spectral import (
    ScalingLaw,
    adapter_parameters,
    capacity_utilization,
    dominance,
    effective_rank,
    energy_curve,
    energy_rank,
    fit_scaling_law,
    forward_multiply_adds,
    full_parameters,
    imbalance_ratio,
    knee,
    loss_gap_bound,
    parameter_ratio,
    pearson,
    spectral_entropy,
    spectral_truncation_error,
    stable_rank,
    truncation_error,
    utilization,
)

SUMMARIES = {
    "effective_rank": (effective_rank, lambda s: math.exp(entropy(s))),
    "spectral_entropy": (spectral_entropy, lambda s: entropy(s)),
    "capacity_utilization": (capacity_utilization, lambda s: math.exp(entropy(s)) / len(s)),
    "stable_rank": (stable_rank, lambda s: (s**2).sum() / s.max() ** 2),
    "utilization": (utilization, lambda s: (s**2).sum() / s.max() ** 2 / len(s)),
    "energy_rank": (lambda s: energy_rank(s, 0.9), lambda s: literal_energy_rank(s, 0.9)),
    "energy_curve": (energy_curve, lambda s: np.cumsum(np.sort(s)[::-1] ** 2) / (s**2).sum()),
    "dominance": (dominance, lambda s: s / s.sum()),
}
SCALE_INVARIANT = [*SUMMARIES, "knee"]
REFUSING_EMPTY = [*SUMMARIES, "knee", "truncation_error", "spectral_truncation_error"]
FUNCTIONS = {name: function for name, (function, _) in SUMMARIES.items()} | {
    "knee": knee,
    "truncation_error": lambda s: truncation_error(s, 1),
    "spectral_truncation_error": lambda s: spectral_truncation_error(s, 1),
    "loss_gap_bound": lambda s: loss_gap_bound(s, 1, 2.0),
}


def entropy(s):
    p = s[s > 0] / s.sum()
    return -(p * np.log(p)).sum()


def literal_energy_rank(s, q):
    energy = np.sort(s.astype(np.float64))[::-1] ** 2
    return next(k for k in range(1, len(s) + 1) if math.fsum(energy[:k]) >= q * math.fsum(energy) * (1 - 1e-14))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [([2, 2, 2], 3.0), ([5, 0, 0], 1.0), ([0, 0, 0], 0.0), ([3e38, 3e38, 0], 2.0)],
)
def test_effective_and_stable_rank_of_known_spectra(spectrum, expected, dtype):
    s = torch.tensor(spectrum, dtype=dtype)
    assert effective_rank(s).item() == pytest.approx(expected, rel=1e-6)
    assert stable_rank(s).item() == pytest.approx(expected, rel=1e-6)


spectra = st.lists(st.floats(0.015625, 16, width=16), min_size=1, max_size=12).map(np.array)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMMARIES)
@settings(deadline=None, max_examples=40)
@given(spectrum=spectra)
def test_summaries_match_the_literal_formula_in_any_order_and_dtype(name, spectrum):
    function, literal = SUMMARIES[name]
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 2e-5)):
        np.testing.assert_allclose(
            function(torch.tensor(spectrum, dtype=dtype)), literal(spectrum), rtol=rtol, atol=rtol
        )
    if name != "dominance":
        reverse = torch.tensor(spectrum).flip(-1)
        np.testing.assert_allclose(function(reverse), function(torch.tensor(spectrum)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SCALE_INVARIANT)
@settings(deadline=None, max_examples=25)
@given(spectrum=spectra, exponent=st.integers(-100, 100))
def test_summaries_do_not_change_with_scale(name, spectrum, exponent):
    s = torch.tensor(spectrum, dtype=torch.float32)
    assert torch.equal(FUNCTIONS[name](s * 2.0**exponent), FUNCTIONS[name](s))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_spectra_give_zero_and_batches_go_item_by_item(name):
    assert not FUNCTIONS[name](torch.zeros(3, 4)).any()
    batch = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    single = torch.stack([FUNCTIONS[name](row) for row in batch])
    assert_close_outputs(FUNCTIONS[name](batch), single)
    assert FUNCTIONS[name](torch.ones(0, 4)).shape[0] == 0


@pytest.mark.parametrize("name", REFUSING_EMPTY)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_spectra_without_entries_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"must have .*(r >= 1 entries|at least one entry).*got shape"):
        FUNCTIONS[name](torch.ones(shape))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_looks_at_the_data(name):
    on_meta = FUNCTIONS[name](torch.ones(3, 4, device="meta"))
    assert on_meta.shape == FUNCTIONS[name](torch.ones(3, 4)).shape


def test_utilizations_take_the_stored_rank():
    s = torch.tensor([1.0, 1.0])
    assert capacity_utilization(s, 8).item() == pytest.approx(0.25)
    assert utilization(s, 8).item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="`rank` must be at least 1; got 0"):
        utilization(s, 0)
    with pytest.raises(TypeError, match="`rank` must be an integer; got float"):
        capacity_utilization(s, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_energy_rank_is_robust_to_rounding(dtype):
    s = torch.tensor([0.1] * 10 + [0.0] * 3, dtype=dtype)
    assert energy_rank(s, 1.0) == 10
    assert energy_rank(s, 0.3) == 3
    assert energy_rank(s, 0.31) == 4
    assert energy_rank(torch.tensor([1.0, 1e-30, 0.0], dtype=dtype), 1.0) <= 2
    assert energy_rank(torch.tensor([4.0, 3.0], dtype=dtype), 0.64) == 1
    assert energy_rank(s, 0.9).dtype == torch.int64


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, math.nan])
def test_energy_rank_refuses_what_is_no_share(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must be a share of the energy in \(0, 1\]"):
        energy_rank(torch.ones(3), threshold)


@settings(deadline=None, max_examples=40)
@given(spectra, st.integers(0, 15))
def test_truncation_errors_are_the_tail(spectrum, rank):
    tail = np.sort(spectrum)[::-1][rank:]
    s = torch.tensor(spectrum)
    assert truncation_error(s, rank).item() == pytest.approx((tail**2).sum(), rel=1e-12)
    assert spectral_truncation_error(s, rank).item() == (tail[0] if len(tail) else 0.0)
    assert loss_gap_bound(s, rank, 3.0).item() == pytest.approx(1.5 * (tail**2).sum(), rel=1e-12)


def test_truncation_errors_refuse_bad_arguments():
    with pytest.raises(ValueError, match="`rank` must be at least 0; got -1"):
        truncation_error(torch.ones(2), -1)
    with pytest.raises(ValueError, match="`smoothness` must be finite and not negative; got -1"):
        loss_gap_bound(torch.ones(2), 1, -1.0)


def test_loss_gap_bound_holds_with_equality_for_a_quadratic():
    target = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    loss = 0.5 * 5.0 * (torch.diag(torch.tensor([3.0, 0.0, 0.0])) - target).square().sum()
    assert loss_gap_bound(torch.tensor([3.0, 2.0, 1.0]), 1, 5.0).item() == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        ([10, 9, 1, 0.5, 0], 2),
        ([10, 0.1, 0.1, 0.1], 1),
        ([1, 0, 0, 0], 1),
        ([0.1, 10, 0.1, 0.1], 1),
        ([2, 2, 2], 3),
        ([3, 2, 1], 3),
        ([2, 2, 0], 2),
        ([7], 1),
        ([0], 0),
        ([0, 0, 0], 0),
    ],
)
def test_knee_of_known_spectra(spectrum, expected):
    assert knee(torch.tensor(spectrum, dtype=torch.float32)) == expected


@pytest.mark.parametrize(("a", "b", "expected"), [(6, 2, 3), (2, 6, 3), (0, 2, math.inf), (0, 0, 1), (2, 2, 1)])
def test_imbalance_ratio(a, b, expected):
    assert imbalance_ratio(torch.tensor(float(a)), torch.tensor(float(b)).double()).item() == expected


@settings(deadline=None, max_examples=40)
@given(st.floats(0.1, 3), st.just(0.0) | st.floats(1e-3, 2) | st.floats(-1, -1e-3))  # between: rounding of the data
def test_scaling_law_is_recovered(a, beta):
    ranks = torch.tensor([2, 4, 8, 16, 64])
    law = fit_scaling_law(ranks, a * ranks.double() ** beta)
    assert (law.a, law.beta, law.r_squared) == pytest.approx((a, beta, 1.0), abs=1e-9)
    assert law(32) == pytest.approx(a * 32**beta)


def test_scaling_law_matches_numpy_on_noisy_data():
    ranks, values = [2, 4, 8, 16, 32], [1.8, 3.1, 4.0, 7.7, 9.0]
    beta, intercept = np.polyfit(np.log(ranks), np.log(values), 1)
    r_squared = np.corrcoef(np.log(ranks), np.log(values))[0, 1] ** 2
    law = fit_scaling_law(ranks, values)
    assert (law.a, law.beta, law.r_squared) == pytest.approx((math.exp(intercept), beta, r_squared))
    assert fit_scaling_law([2, 4], [3, 3]) == ScalingLaw(pytest.approx(3.0), pytest.approx(0.0), 1.0)


@pytest.mark.parametrize(
    ("ranks", "values", "message"),
    [
        ([2], [1], "of the same length of at least 2"),
        ([2, 4], [1, 2, 3], r"got shapes \(2,\) and \(3,\)"),
        ([2, 2], [1, 2], "`ranks` must have at least two different values"),
        ([2, 4], [0, 2], "`effective_ranks` must be positive; got 0.0"),
        ([0, 4], [1, 2], "`ranks` must be positive; got 0.0"),
        ([2, 4], [math.nan, 2], "`effective_ranks` must be finite"),
    ],
)
def test_scaling_law_errors(ranks, values, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(ranks, values)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(3, 30), st.sampled_from([1e-200, 1.0, 1e200]))
def test_pearson_matches_numpy(seed, n, scale):
    x, y = np.random.default_rng(seed).normal(size=(2, n))
    assert pearson(x * scale, y.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert pearson(x, -2 * x + 1) == pytest.approx(-1.0)


def test_pearson_refuses_a_constant():
    with pytest.raises(ValueError, match="`y` must not be constant"):
        pearson([1, 2], [3, 3])
    with pytest.raises(ValueError, match="`x` must be finite"):
        pearson([1, math.inf], [3, 4])


def test_costs():
    assert adapter_parameters(16, 4096, 1024) == 16 * 5120
    assert forward_multiply_adds(16, 4096, 1024) == 16 * 5120
    assert full_parameters(4096, 1024) == 4096 * 1024
    assert parameter_ratio(16, 4096, 1024) == 16 * 5120 / (4096 * 1024)
    with pytest.raises(ValueError, match="`d_in` must be at least 1; got 0"):
        full_parameters(1, 0)


def test_gradients_flow_through_smooth_metrics():
    s = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    for function in (stable_rank, spectral_entropy, energy_curve, lambda s: truncation_error(s, 1)):
        assert torch.autograd.gradcheck(function, s)
