"""Matching of pattern keys to module names: PEFT's rule, in time that grows linearly."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.naming.matching import PatternMatcher
from lorakit.naming.patterns import compact_pattern

PARTS = ["q", "v", "layers", "1", "11", "a+b", "q_proj", "x", "aXb", "", "é", "q\n"]
NAMES = st.lists(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True
)
LITERALS = st.tuples(st.sampled_from(["", "^"]), NAMES.map(lambda names: names[0]), st.booleans()).map(
    lambda drawn: drawn[0] + (re.escape(drawn[1]) if drawn[2] else drawn[1])
)
EXPRESSIONS = st.sampled_from(
    ["a.b", "layers.1.q", r"layers\.1.*", "q|v", ".", "..", "1$", r"\d+", r"^layers\.\d.q", "(?i:Q)", "q?", r"\x71", ""]
)


@pytest.mark.slow
@given(names=NAMES, keys=st.lists(LITERALS | EXPRESSIONS, max_size=8, unique=True))
@example(names=["a_b", "x.a.b"], keys=["a.b", r"a\.b", "^a.b"])
@example(names=["q", "x.q"], keys=["^q", "q"])
@settings(max_examples=500, deadline=None)
def test_the_first_key_is_peft_s(names, keys):
    matcher = PatternMatcher(keys)
    for name in names:
        expected = get_pattern_key(keys, name)
        matches = [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]
        assert matcher.first(name) == (expected if matches else None)
    matched = {key for key in keys for name in names if re.match(rf"(.*\.)?({key})$", name)}
    assert matcher.unmatched(names) == [key for key in keys if key not in matched and key not in names]


def test_a_key_that_is_no_expression():
    with pytest.raises(re.error, match="unterminated"):
        PatternMatcher(["("])


def names_of(count: int) -> list[str]:
    return [f"model.layers.{i // 7}.mlp.experts.{i % 7}.down_proj" for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("key_of", [lambda name: "^" + name, lambda name: "^" + re.escape(name), lambda name: name])
def test_ten_thousand_names_take_no_more_than_linear_time(key_of):
    """At 16 times as many, the quadratic way would take 256 times as long."""

    def seconds(count):
        names = names_of(count)
        start = time.process_time()
        matcher = PatternMatcher(map(key_of, names))
        assert [matcher.first(name) for name in names] == list(map(key_of, names))
        assert matcher.unmatched(names) == []
        return time.process_time() - start

    small = min(seconds(625) for _ in range(3))
    assert seconds(10_000) < 64 * small


@pytest.mark.slow
def test_patterns_of_ten_thousand_modules_are_compacted_in_seconds():
    names = names_of(10_000)
    values = {name: 1 + i % 3 for i, name in enumerate(names)}
    start = time.process_time()
    pattern = compact_pattern(values, set())
    assert time.process_time() - start < 10
    assert len(pattern) == 10_000
