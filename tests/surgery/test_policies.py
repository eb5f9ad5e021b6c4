"""Policies against the paper's formulas written out in numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.surgery import (
    POLICIES,
    AbsSelect,
    DoubleSmooth,
    GradDirection,
    RandomIndex,
    RobustZ,
    SmoothAbs,
    ZScore,
)
from lorakit.surgery._policies import preserve, resolve_policy


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def normalized(g):
    return g / np.abs(g).mean()


def abs_select(sigma, g, core_frac=0.2, noise_frac=0.2):
    r = len(g)
    k_core = min(max(round(core_frac * r), 1), r)
    k_noise = max(0, min(round(noise_frac * r), r - k_core))
    ranked = sorted(range(r), key=lambda i: -abs(g[i]))
    gate = np.ones(r)
    gate[ranked[:k_core]] = 1.25
    gate[ranked[r - k_noise :]] = 0.80
    return sigma * gate


def smooth_abs(sigma, g):
    x = np.abs(normalized(g))
    if x.max() - x.min() < 1e-12:
        return sigma
    lo, hi, center = np.quantile(x, 0.2), np.quantile(x, 0.8), np.median(x)
    tau = 0.35 * max(hi - lo, 1e-8)
    p = (1.0 - 0.80) / (1.25 - 0.80)
    mu = center - tau * np.log(p / (1 - p))
    return sigma * (0.80 + 0.45 * sigmoid((x - mu) / tau))


def two_sided(x, low, high, tau):
    return 1.0 - 0.20 * sigmoid((low - x) / tau) + 0.25 * sigmoid((x - high) / tau)


def double_smooth(sigma, g):
    x = np.abs(normalized(g))
    tau = 0.35 * max(x.max() - x.min(), 1e-8)
    return sigma * two_sided(x, np.quantile(x, 0.2), np.quantile(x, 0.8), tau)


def z_score(sigma, g):
    x = np.abs(normalized(g))
    z = (x - x.mean()) / max(x.std(), 1e-8)
    return sigma if x.std() < 1e-6 or np.abs(z).max() < 1e-3 else sigma * two_sided(z, -0.5, 1.0, 0.2)


def robust_z(sigma, g):
    x = np.abs(normalized(g))
    lower_median = lambda v: np.sort(v)[(len(v) - 1) // 2]  # noqa: E731
    deviation = 1.4826 * lower_median(np.abs(x - lower_median(x)))
    return sigma if deviation < 1e-6 else sigma * two_sided((x - lower_median(x)) / deviation, -0.5, 1.0, 0.2)


def grad_direction(sigma, g):
    g = normalized(g)
    step = 2.0 * np.maximum(g, 0) - 0.2 * np.maximum(-g, 0)
    return sigma * np.exp(-step)


REFERENCES = {f.__name__: f for f in (abs_select, smooth_abs, double_smooth, z_score, robust_z, grad_direction)}


def spectrum(seed, r):
    rng = np.random.default_rng(seed)
    return np.sort(rng.exponential(size=r))[::-1].copy(), rng.normal(size=r) * 10.0 ** rng.integers(-6, 3)


def apply(policy, sigma, g, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return policy(torch.tensor(sigma), torch.tensor(g), generator=generator).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
@given(seed=st.integers(0, 10**6), r=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_defaults_are_the_formulas(name, seed, r):
    sigma, g = spectrum(seed, r)
    np.testing.assert_allclose(apply(POLICIES[name](), sigma, g), REFERENCES[name](sigma, g), rtol=1e-9)


@pytest.mark.parametrize(("r", "core", "noise"), [(16, 3, 3), (64, 13, 13), (2, 1, 0), (1, 1, 0), (7, 1, 1), (3, 1, 1)])
def test_the_random_control_has_as_many_of_each_factor_as_abs_select(r, core, noise):
    sigma, g = spectrum(0, r)
    picks = [apply(RandomIndex(), sigma, g, seed) / sigma for seed in range(20)]
    for gate in picks:
        assert (np.isclose(gate, 1.25).sum(), np.isclose(gate, 0.80).sum()) == (core, noise)
    np.testing.assert_array_equal(picks[3], apply(RandomIndex(), sigma, g, 3) / sigma)
    if r > 3:
        assert len({tuple(np.round(gate, 3)) for gate in picks}) > 3
    chosen = apply(AbsSelect(), sigma, g) / sigma
    assert (np.isclose(chosen, 1.25).sum(), np.isclose(chosen, 0.80).sum()) == (core, noise)


def test_the_smooth_gate_is_mid_at_the_median_and_between_sup_and_amp():
    sigma, g = spectrum(5, 17)
    gate = apply(SmoothAbs(), sigma, g) / sigma
    middle = np.argsort(np.abs(g))[8]
    assert gate[middle] == pytest.approx(1.0, abs=1e-12)
    assert ((gate > 0.80) & (gate < 1.25)).all()
    assert (np.diff(gate[np.argsort(np.abs(g))]) >= 0).all()
    shifted = apply(SmoothAbs(align_mid=False), sigma, g) / sigma
    assert shifted[middle] == pytest.approx((0.80 + 1.25) / 2)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("g", [np.zeros(8), np.full(8, 3.0), np.full(8, -1e-30)], ids=["zero", "equal", "tiny"])
def test_sensitivities_that_do_not_differ_give_finite_results(name, g):
    sigma = np.linspace(2, 1, 8)
    edited = apply(POLICIES[name](), sigma, g)
    assert np.isfinite(edited).all()
    if name in ("smooth_abs", "z_score", "robust_z"):
        np.testing.assert_allclose(edited, sigma, rtol=1e-12)


@pytest.mark.parametrize(
    ("policy", "crossing"), [(SmoothAbs, (0.25, 0.75)), (DoubleSmooth, (0.45, 0.55))], ids=["smooth", "double"]
)
def test_fractions_that_cross_fall_back(policy, crossing):
    sigma, g = spectrum(1, 16)
    x = np.abs(normalized(g))
    low, high = np.quantile(x, crossing[0]), np.quantile(x, crossing[1])
    actual = apply(policy(core_frac=0.7, noise_frac=0.5), sigma, g)
    if policy is DoubleSmooth:
        expected = sigma * two_sided(x, low, high, 0.35 * (x.max() - x.min()))
    else:
        tau = 0.35 * (high - low)
        expected = sigma * (0.80 + 0.45 * sigmoid((x - np.median(x)) / tau + np.log(0.2 / 0.25)))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_variants_of_the_signed_step():
    sigma, g = spectrum(2, 9)
    n = normalized(g)
    step = 2.0 * np.maximum(n, 0) ** 2 - 0.2 * np.maximum(-n, 0)
    np.testing.assert_allclose(apply(GradDirection(power=2), sigma, g), sigma * np.exp(-step))
    np.testing.assert_allclose(apply(GradDirection(asymmetric=False), sigma, g), sigma * np.exp(-0.2 * n))
    np.testing.assert_allclose(apply(GradDirection(asymmetric=False, update="additive"), sigma, g), sigma - 0.2 * n)
    np.testing.assert_allclose(
        apply(GradDirection(normalization="l2", asymmetric=False), sigma, g),
        sigma * np.exp(-0.2 * g / np.linalg.norm(g)),
    )
    assert GradDirection().aggregate == "mean"
    assert {policy().aggregate for name, policy in POLICIES.items() if name != "grad_direction"} == {"mean_abs"}


@given(seed=st.integers(0, 10**6), r=st.integers(1, 30), energy=st.sampled_from(["l1", "l2", "none"]))
@settings(max_examples=60, deadline=None)
def test_energy_is_preserved_after_the_clamp(seed, r, energy):
    sigma, g = spectrum(seed, r)
    proposed = sigma + g / np.abs(g).max()
    edited = preserve(torch.tensor(proposed), torch.tensor(sigma), energy).numpy()
    assert (edited >= 0).all()
    clamped = np.maximum(proposed, 0)
    if energy == "none":
        np.testing.assert_array_equal(edited, clamped)
    elif clamped.any():
        order = 1 if energy == "l1" else 2
        assert np.linalg.norm(edited, order) == pytest.approx(np.linalg.norm(sigma, order), rel=1e-12)


def test_an_edit_that_removes_everything_stays_zero():
    assert preserve(-torch.ones(3), torch.ones(3), "l1").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AbsSelect(core_frac=1.5), r"`core_frac` of AbsSelect must be in \[0, 1\]; got 1.5"),
        (lambda: AbsSelect(amp=float("nan")), "`amp` of AbsSelect must be finite"),
        (lambda: SmoothAbs(temperature=0), "`temperature` of SmoothAbs must be > 0"),
        (lambda: SmoothAbs(mid=2.0), "`mid` of SmoothAbs must be between `sup` and `amp`"),
        (lambda: ZScore(low=2.0), "`low` of ZScore must be at most `high`"),
        (lambda: RobustZ(normalization="max"), "`normalization` of RobustZ must be 'mean_abs', 'l2' or 'none'"),
        (lambda: GradDirection(update="odd"), "`update` of GradDirection must be"),
        (lambda: resolve_policy("clever"), "`policy` must be one of abs_select, .*; got 'clever'"),
    ],
)
def test_bad_parameters_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policy", [AbsSelect, 3, lambda s, g, generator: s])
def test_anything_else_than_a_policy_is_a_type_error(policy):
    with pytest.raises(TypeError, match="`policy` must be a name or an object"):
        resolve_policy(policy)


def test_policies_are_frozen_and_found_by_name():
    assert resolve_policy("smooth_abs") == SmoothAbs()
    mine = AbsSelect(core_frac=0.4)
    assert resolve_policy(mine) is mine
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.core_frac = 0.1
