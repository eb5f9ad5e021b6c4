"""Suggested ranks as a config: the model that PEFT makes of it has these ranks and scalings, and no other modules."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit.lens import RankSuggestion, audit

NAMES = [f"layers.{i}.{leaf}" for i in range(3) for leaf in ("q", "v")]


def adapted(model, name="default"):
    """By module, the rank and the scaling that PEFT's layers have."""
    return {
        path: (layer.r[name], layer.scaling[name])
        for path, layer in model.get_base_model().named_modules()
        if name in getattr(layer, "lora_A", {})
    }


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({leaf: nn.Linear(8, 8) for leaf in ("q", "v")}) for _ in range(3))


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 8, "lora_alpha": 16, "use_rslora": True},
        {"r": 8, "lora_alpha": 5, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"layers.1.self_attn.v_proj": 4}},
    ],
)
def test_a_model_made_from_a_suggestion_has_its_ranks_and_the_adapters_scalings(tiny_llama, randomize, config):
    config = LoraConfig(**config, target_modules=["q_proj", "v_proj"])
    probe = randomize(get_peft_model(tiny_llama(), config))
    before = adapted(probe)
    for suggestion in audit(probe, suggest_ranks=True).suggestions:
        made = suggestion.to_config(task_type="CAUSAL_LM", lora_dropout=0.25)
        after = adapted(get_peft_model(tiny_llama(), made))
        assert {name: rank for name, (rank, _) in after.items()} == suggestion.ranks
        assert {name: scaling for name, (_, scaling) in after.items()} == pytest.approx(
            {name: scaling for name, (_, scaling) in before.items()}, rel=1e-12
        )
        assert (made.lora_dropout, made.task_type, made.use_rslora) == (0.25, "CAUSAL_LM", False)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 8), min_size=6, max_size=6),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 1 / 3, 0.7]), min_size=6, max_size=6),
)
def test_any_ranks_and_scalings_are_those_of_the_model(ranks, scalings):
    by_name, wanted = dict(zip(NAMES, ranks, strict=True)), dict(zip(NAMES, scalings, strict=True))
    suggestion = RankSuggestion("any", None, by_name, 0, 1.0, 0, 8, 0, wanted)
    found = adapted(get_peft_model(Layers(), suggestion.to_config()))
    assert {name: rank for name, (rank, _) in found.items()} == by_name
    assert {name: scaling for name, (_, scaling) in found.items()} == pytest.approx(wanted, rel=1e-12)


def test_only_the_audited_modules_are_adapted(tiny_llama, randomize):
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1])
    probe = randomize(get_peft_model(tiny_llama(), config))
    made = audit(probe, suggest_ranks=True).suggestions[0].to_config()
    assert list(adapted(get_peft_model(tiny_llama(), copy.deepcopy(made)))) == ["model.layers.1.self_attn.q_proj"]


def test_a_field_that_the_ranks_decide_is_refused():
    suggestion = RankSuggestion("any", None, {"0": 2}, 0, 1.0, 0, 8, 0, {"0": 1.0})
    with pytest.raises(ValueError, match="`fields` must not have r: the suggested ranks decide them."):
        suggestion.to_config(r=4)
