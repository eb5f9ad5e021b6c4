"""Regular expressions of configs that PEFT's `re` would not come back from."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit.errors import PatternError
from lorakit.naming import _config_expressions
from lorakit.naming._config_expressions import check_expressions

NAMES = ["model.layers.0.self_attn.q_proj", "a" * 40 + "!", "model.layers.1.mlp.down_proj"]
ENDLESS = ["(a+)+", "(a|aa)+x", "(a*)*b", ".*.*.*.*.*.*.*.*.*.*x", r"([\w.]|\w\w|\w)+\?", "(?i)(A+)+"]
FIELDS = {
    "target_modules": lambda text: text,
    "exclude_modules": lambda text: text,
    "modules_to_save": lambda text: ["lm_head", text],
    "layers_pattern": lambda text: ["layers", text],
    "rank_pattern": lambda text: {"q_proj": 4, text: 2},
    "alpha_pattern": lambda text: {text: 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
def test_an_endless_expression_is_refused_by_name_wherever_peft_reads_one(field, monkeypatch):
    monkeypatch.setattr(_config_expressions, "_SECONDS", 0.3)
    with pytest.raises(PatternError, match=r"\(a\+\)\+x' of the adapter's config takes too long"):
        check_expressions({field: FIELDS[field]("(a+)+x")}, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("text", ENDLESS)
def test_endless_expressions(text, monkeypatch):
    monkeypatch.setattr(_config_expressions, "_SECONDS", 0.3)
    with pytest.raises(PatternError):
        check_expressions({"target_modules": text}, NAMES)


def test_what_ends_or_is_no_expression_is_left_to_peft():
    for text in (r".*layers\.\d+\..*(q|v)_proj", "(", "all-linear", "(?i:Q_PROJ)", "(" * 200 + ")" * 200, "\ud800*"):
        check_expressions({"target_modules": text, "rank_pattern": {text: 1}, "modules_to_save": [text]}, NAMES)
    check_expressions(
        {"target_modules": ["(a+)+"], "modules_to_save": 7, "rank_pattern": [1], "layers_pattern": {}}, NAMES
    )


def test_plain_names_start_no_process(monkeypatch):
    monkeypatch.setattr(_config_expressions.sys, "executable", "/nowhere")
    check_expressions({"target_modules": "q_proj", "rank_pattern": {r"layers\.0\.q_proj": 1}}, NAMES)
    with pytest.raises(PatternError, match="no process can be started"):
        check_expressions({"target_modules": ".*q_proj"}, NAMES)


def test_peft_still_matches_by_these_rules(monkeypatch):
    """A release of PEFT that stops taking its fields as these expressions makes the table above wrong."""
    import re

    seen = set()
    for method in ("match", "fullmatch"):
        original = getattr(re, method)

        def spy(pattern, string, flags=0, *, original=original, method=method):
            seen.add((pattern, method))
            return original(pattern, string, flags)

        monkeypatch.setattr(re, method, spy)
    layers = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)})])})
    model = nn.ModuleDict({"model": layers})
    fields = {
        "exclude_modules": "x[v]",
        "rank_pattern": {"q+": 1},
        "alpha_pattern": {"[q]": 1},
        "modules_to_save": ["(v)"],
    }
    first = LoraConfig(r=2, target_modules=["q"], layers_to_transform=[0], layers_pattern=["layer[s]"], **fields)
    second = LoraConfig(r=2, target_modules=".*[q]")
    for config in (first, second):
        get_peft_model(model, config)
        expected = _config_expressions._expressions(config.to_dict())
        assert {expression.sent() for expression in expected} <= seen
