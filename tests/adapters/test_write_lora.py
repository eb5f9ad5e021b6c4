"""The arithmetic of what is written: one rank, one scaling, the entries that were there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.write_lora import StoredUpdate, integral, plain_lora


def update(name, rank, scaling, dtype=torch.float32, groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 5, generator=generator).to(dtype)
    B = torch.randn(4, rank // groups, generator=generator).to(dtype)
    return StoredUpdate(name, A, B, scaling, dtype, dtype, f"{name}.A", f"{name}.B", groups)


def dense(A, B, groups=1):
    parts = zip(A.double().chunk(groups), B.double().chunk(groups), strict=True)
    return torch.cat([b @ a for a, b in parts]).numpy()


MODULES = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([2.0, 0.5, 1.75, 1 / 3, -1.5, 0.0, 1e-10])), min_size=1, max_size=4
)


@pytest.mark.slow
@given(MODULES, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_every_reading_is_the_update(modules, pad, integer_alpha, dtype):
    updates = [update(str(i), rank, s, dtype, seed=i) for i, (rank, s) in enumerate(modules)]
    lora = plain_lora(updates, pad=pad, integer_alpha=integer_alpha)
    for one in updates:
        A, B = lora.tensors[one.A_key], lora.tensors[one.B_key]
        rank = len(A)
        assert rank == (lora.r if pad else one.rank)
        assert (A.dtype, B.dtype) == (dtype, dtype)
        meant = one.scaling * dense(one.A, one.B)
        r, alpha = lora.rank_pattern.get(one.name, lora.r), lora.alpha_pattern.get(one.name, lora.lora_alpha)
        readings = [lora.lora_alpha / lora.r, alpha / r] + ([lora.lora_alpha / rank] if pad else [])
        for reading in readings:
            written = reading * dense(A, B)
            assert np.linalg.norm(written - meant) <= 4 * torch.finfo(dtype).eps * np.linalg.norm(meant)
    if pad:
        assert not lora.rank_pattern
        assert not lora.alpha_pattern
    if integer_alpha or dtype is not torch.bfloat16:
        assert isinstance(lora.lora_alpha, int)
    assert lora.lora_alpha != 0


@pytest.mark.slow
@given(MODULES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_factors_at_the_written_scaling_keep_their_entries(modules, dtype):
    updates = [update(str(i), rank, s, dtype, seed=i) for i, (rank, s) in enumerate(modules)]
    lora = plain_lora(updates)
    for one in updates:
        assert torch.equal(lora.tensors[one.A_key][: one.rank], one.A)
        assert not lora.tensors[one.A_key][one.rank :].any()
        assert not lora.tensors[one.B_key][:, one.rank :].any()
        if lora.lora_alpha == one.scaling * lora.r:
            assert torch.equal(lora.tensors[one.B_key][:, : one.rank], one.B)


def test_the_most_frequent_scaling_is_kept():
    lora = plain_lora([update("a", 4, 0.5), update("b", 2, 2.0), update("c", 3, 2.0)])
    assert (lora.r, lora.lora_alpha) == (4, 8)


@pytest.mark.parametrize(("dtype", "integer_alpha", "alpha"), [
    (torch.float32, False, 5),
    (torch.bfloat16, False, 8.75),
    (torch.float16, True, 5),
])  # fmt: skip
def test_fractional_alphas(dtype, integer_alpha, alpha):
    lora = plain_lora([update("a", 5, 1.75, dtype)], integer_alpha=integer_alpha)
    assert lora.lora_alpha == alpha
    assert isinstance(lora.lora_alpha, type(alpha))


def test_a_scaling_that_b_cannot_hold_stays_in_alpha():
    lora = plain_lora([update("a", 2, 1e-40)])
    assert lora.lora_alpha == 2e-40
    assert torch.equal(lora.tensors["a.B"], update("a", 2, 1e-40).B)


@pytest.mark.parametrize(
    ("value", "expected"), [(8.0, 8), (8.75, 8.75), (1e-10, 1e-10), (0.0, 0), (3 * (1 / 3) * 24, 24), (1e15, 10**15)]
)
def test_integral(value, expected):
    assert integral(value) == expected
    assert isinstance(integral(value), int) == isinstance(expected, int)


@pytest.mark.parametrize("rank", [4, 8])
def test_grouped_convolutions_are_padded_in_each_group(rank):
    grouped, other = update("grouped", rank, 2.0, groups=4), update("other", 9, 2.0)
    lora = plain_lora([grouped, other])
    assert lora.r == 12  # the next multiple of the groups
    A, B = lora.tensors["grouped.A"], lora.tensors["grouped.B"]
    assert (len(A), B.shape[1]) == (12, 3)
    assert np.array_equal(dense(A, B, 4), dense(grouped.A, grouped.B, 4))


def test_the_rank_to_pad_to_can_be_chosen():
    lora = plain_lora([update("a", 9, 2.0)], fitting_rank=lambda rank: -(-rank // 16) * 16)
    assert (lora.r, lora.lora_alpha) == (16, 32)
