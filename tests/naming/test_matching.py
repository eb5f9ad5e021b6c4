"""Matching of pattern keys to module names: PEFT's rule, in time that grows linearly."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.adapters.config import AdapterSettings
from lorakit.errors import AdapterFileError, PatternError
from lorakit.naming.matching import Budget, PatternMatcher, compiled
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
def test_ten_thousand_names_find_their_own_keys(key_of):
    """tests/test_scale.py counts the calls that this takes."""
    names = names_of(10_000)
    matcher = PatternMatcher(map(key_of, names))
    assert [matcher.first(name) for name in names] == list(map(key_of, names))
    assert matcher.unmatched(names) == []


@pytest.mark.slow
def test_patterns_of_ten_thousand_modules_are_compacted_in_seconds():
    names = names_of(10_000)
    values = {name: 1 + i % 3 for i, name in enumerate(names)}
    start = time.process_time()
    pattern = compact_pattern(values, set())
    assert time.process_time() - start < 10
    assert len(pattern) == 10_000


# Expressions that `regex` knows and `re` does not read as such, among those that both read alike.
PIECES = [
    "q",
    "v",
    ".",
    "[",
    "]",
    "[^",
    "[]",
    "[^]",
    "[[:alpha:]]",
    "[:",
    "{",
    "}",
    "{e}",
    "{e<=1}",
    "{i}",
    "{,2}",
    "{1}",
    "{1,}",
]
PIECES += [
    "{}",
    "{2,1",
    "(",
    ")",
    "(?:",
    "(?i:",
    "(?=",
    "(?>",
    "|",
    "*",
    "+",
    "*?",
    "++",
    "\\.",
    "\\d",
    "\\[",
    "\\]",
    "\\{",
    "\\\\",
    "^",
    "$",
]
PIECES += [
    "&&",
    "--",
    "||",
    "~~",
    "a-z",
    "\\N{DIGIT ONE}",
    "ß",
    "ſ",
    "K",
    "(?P<x>",
    "(?P=x)",
    "\\2",
    "\\p{L}",
    "\\L<q>",
    "(?|",
    "(?r)",
    "\\b",
]
TEXTS = st.text(alphabet="qva.[]{}:e1i<=,&|~-^\\ßſK\u212as1l", max_size=6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=6), name=TEXTS, more=st.lists(TEXTS, max_size=4))
@example(pieces=["(q)", "{e<=1}"], name="q{e<=1}", more=["v", ""])
@example(pieces=["[[:alpha:]]"], name=":]", more=["q", "h]"])
@example(pieces=["[]", "q]"], name="]", more=["q"])
@settings(max_examples=3000, deadline=None)
def test_expressions_mean_what_they_mean_in_re(pieces, name, more):
    key = "".join(pieces)
    try:
        expected = re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        with pytest.raises(re.error, match=re.escape(str(error))):
            compiled(key)
        return
    for text in (name, *more, key):
        assert compiled(key).match(text, Budget()) == bool(expected.match(text)), text


def catastrophic():
    """A key that takes longer than the age of the universe, and a name to match."""
    return "(a|aa)+x", "model." + "a" * 200


def test_an_expression_that_would_never_end_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr("lorakit.naming.matching._SECONDS", 0.2)
    key, name = catastrophic()
    started = time.perf_counter()
    message = (
        r"The regular expression '\(a\|aa\)\+x' takes too long for the module name 'model\.a+\.\.\.\. Write it without"
    )
    with pytest.raises(PatternError, match=message):
        PatternMatcher([key]).first(name)
    with pytest.raises(PatternError, match="takes too long"):
        PatternMatcher([key]).unmatched([name])
    assert time.perf_counter() - started < 30


def test_many_slow_expressions_have_one_budget(monkeypatch):
    monkeypatch.setattr("lorakit.naming.matching._SECONDS", 0.2)
    key, name = catastrophic()
    matcher = PatternMatcher([f"{key}{i}" for i in range(2000)])
    started = time.perf_counter()
    for i in range(2000):
        with pytest.raises(PatternError):
            matcher.first(name + str(i))
    assert time.perf_counter() - started < 30


def test_a_config_with_such_an_expression_is_refused_not_waited_for(monkeypatch):
    monkeypatch.setattr("lorakit.naming.matching._SECONDS", 0.2)
    key, name = catastrophic()
    settings_ = AdapterSettings.from_config({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {key: 4}})
    with pytest.raises(
        AdapterFileError, match="`rank_pattern` in the adapter's config: The regular expression .* takes too long"
    ):
        settings_.resolve([name])


@pytest.mark.parametrize("key", ["(((a{90}){90}){90}){90}", "(a{1000}){1000}", "a|" * 20_000 + "b"])
def test_an_expression_that_would_fill_the_memory_is_refused(key):
    with pytest.raises(
        AdapterFileError, match=r"`alpha_pattern` in the adapter's config: The regular expression .* is too large"
    ):
        AdapterSettings.from_config({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {key: 4}})
