"""Patterns give every module its value, whatever the order of their entries."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.naming.patterns import alpha_of, compact_pattern, lookup, unmatched_keys, values_of, warn_unmatched

NAMES = st.lists(
    st.lists(st.sampled_from(["q", "v", "layers", "1", "11", "a+b", "q_proj", "x"]), min_size=1, max_size=4).map(
        ".".join
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


@pytest.mark.slow
@given(data=st.data(), names=NAMES, order=st.randoms())
@settings(max_examples=300, deadline=None)
def test_every_module_gets_its_value_in_any_order(data, names, order):
    values = {name: data.draw(st.sampled_from([2, 4, 16])) for name in names}
    pattern = compact_pattern(values, {name for name in names if values[name] == 16})
    entries = list(pattern.items())
    for shuffled in (entries, sorted(entries), order.sample(entries, len(entries))):
        shuffled = dict(shuffled)
        assert {n: shuffled.get(get_pattern_key(shuffled.keys(), n), 16) for n in names} == values


@pytest.mark.slow
@given(
    names=NAMES,
    keys=st.lists(st.sampled_from(["q", "v", "a+b", r"a\+b", r"layers\.1.*", "^q", "1", "q_.*"]), unique=True),
)
@settings(max_examples=200, deadline=None)
def test_lookup_follows_peft(names, keys):
    pattern = {key: i for i, key in enumerate(keys)}
    for name in names:
        assert lookup(pattern, name, -1) == pattern.get(get_pattern_key(pattern.keys(), name), -1)
    assert values_of(pattern, dict.fromkeys(names, -1)) == {name: lookup(pattern, name, -1) for name in names}


def test_modules_that_agree_share_one_entry():
    values = {
        f"model.layers.{i}.self_attn.{name}": 4 if name == "q_proj" else 16
        for i in range(30)
        for name in ("q_proj", "v_proj")
    }
    agreeing = {name for name, value in values.items() if value == 16}
    assert compact_pattern(values, agreeing) == {"q_proj": 4}
    assert compact_pattern(values, set()) == {"q_proj": 4, "v_proj": 16}


def test_a_dot_in_a_name_does_not_match_another_character():
    values = {"a.b.q": 2, "aXb.q": 8, "c.q": 16}
    for seed in range(6):
        entries = list(compact_pattern(values, {"c.q"}).items())
        random.Random(seed).shuffle(entries)
        assert {name: lookup(dict(entries), name, 16) for name in values} == values


@pytest.mark.parametrize(("pattern", "stray"), [({"q": 1, r"layers\.0\..*": 2}, None), ({"k": 1}, "'k'"), ({}, None)])
def test_keys_that_match_no_module_give_one_warning(pattern, stray, recwarn):
    warn_unmatched("X", "k_pattern", pattern, ["layers.0.q", "layers.1.q"])
    messages = [str(warning.message) for warning in recwarn]
    expected = f"X: the following k_pattern keys did not match any targeted module and were ignored: [{stray}]."
    assert messages == ([] if stray is None else [expected])


def test_unmatched_keys_are_those_that_no_name_ends_with():
    names = ["layers.0.q", "layers.1.q"]
    assert unmatched_keys(["q", "k", "layers.0", r"layers\.\d\.q", "layers.1.q"], names) == ["k", "layers.0"]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 16, 100])
def test_alpha_of_keeps_the_scaling(rank, use_rslora):
    def scaling(alpha, rank):
        return alpha / (math.sqrt(rank) if use_rslora else rank)

    alpha = alpha_of(24, rank, 16, use_rslora)
    assert scaling(alpha, rank) == pytest.approx(scaling(24, 16), rel=1e-12)
    assert isinstance(alpha, int) == float(alpha).is_integer()
