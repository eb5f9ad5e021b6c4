"""Sketches against the formula written out, their gauge invariance, and what they estimate."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.parse import assemble
from lorakit.adapters.read import TensorDict
from lorakit.fleet._duplicates import similarity
from lorakit.fleet._sketch import SIZE, sketch


def _adapter(factors, alpha=4.0):
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A, B
    rank = next(iter(factors.values()))[1].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    return assemble("adapter", AdapterSettings.from_config(config), TensorDict(tensors))


def _signs(label, count):
    data = np.frombuffer(hashlib.shake_256(label.encode()).digest(-(-count // 8)), dtype=np.uint8)
    return np.unpackbits(data, bitorder="little")[:count] * 2.0 - 1


def test_the_formula(factors):
    made = factors(0)
    expected = np.zeros(SIZE)
    for name, (B, A) in made.items():
        update = 0.5 * B.numpy() @ A.numpy()
        y = _signs(f"out {update.shape[0]}", SIZE * update.shape[0]).reshape(SIZE, -1)
        x = _signs(f"in {update.shape[1]}", SIZE * update.shape[1]).reshape(SIZE, -1)
        expected += _signs(f"module {name}", SIZE) * np.einsum("jo,oi,ji->j", y, update, x)
    np.testing.assert_allclose(sketch(_adapter(made, alpha=2.0)).numpy(), expected, rtol=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), condition=st.floats(1, 100))
def test_a_gauge_changes_nothing(seed, condition):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {f"m.{i}": (draw(9, 3), draw(3, 7)) for i in range(4)}
    gauged = {}
    for name, (B, A) in made.items():
        Q, P = torch.linalg.qr(draw(3, 3)).Q, torch.linalg.qr(draw(3, 3)).Q
        G = Q @ torch.diag(torch.logspace(0, math.log10(condition), 3, dtype=torch.float64)) @ P
        gauged[name] = (B @ G, torch.linalg.solve(G, A))
    one, other = _adapter(made), _adapter(gauged)
    torch.testing.assert_close(sketch(one), sketch(other), rtol=1e-9, atol=1e-9)
    assert similarity(one, other).difference < 1e-6


def test_squares_estimate_the_squared_norm(factors):
    """Over 200 adapters × 64 entries, whose relative standard deviation is below 3 / √12800."""
    ratios = []
    for seed in range(200):
        made = factors(seed)
        squared = sum(float((B @ A).square().sum()) for B, A in made.values())
        ratios.append(float(sketch(_adapter(made)).square().mean()) / squared)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)


def test_swapped_modules_are_told_apart(factors):
    made = factors(0)
    a, b = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    one, other = sketch(_adapter(made)), sketch(_adapter(made | {a: made[b], b: made[a]}))
    assert float(torch.cosine_similarity(one, other, dim=0)) < 0.95


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_non_finite_updates_have_no_sketch(factors, value):
    made = {name: (torch.full_like(B, value), A) for name, (B, A) in factors(0).items()}
    assert sketch(_adapter(made)) is None


def test_similarity_is_that_of_the_dense_updates(factors):
    one, other = factors(0), factors(1, rank=2)
    del other["model.layers.2.self_attn.v_proj"]

    def dense(made):
        full = [made[name][0] @ made[name][1] if name in made else torch.zeros(8, 16) for name in factors(0)]
        return torch.cat([update.flatten() for update in full]).numpy()

    a, b = dense(one), dense(other)
    b = b * (3.0 / 2)  # alpha / r
    found = similarity(_adapter(one), _adapter(other, alpha=3.0))
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert found.difference == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(b) / np.linalg.norm(a), rel=1e-12)
