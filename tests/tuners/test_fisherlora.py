"""FisherLoRA: its ranks, its one scaling, its targets, and that it is plain LoRA in all but the config."""

from __future__ import annotations

import copy
import io
import json
import math
from contextlib import redirect_stdout

import pytest
import torch
import transformers
from closeness import assert_close_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lorakit import FisherLoRAConfig

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}

# config class, model class, settings, names of the query and of the value projections
FAMILIES = [
    ("LlamaConfig", "LlamaForCausalLM", GROUPED, "q_proj", "v_proj"),
    ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, "q_proj", "v_proj"),
    ("MistralConfig", "MistralForCausalLM", GROUPED | {"head_dim": 8}, "q_proj", "v_proj"),
    ("GemmaConfig", "GemmaForCausalLM", GROUPED | {"head_dim": 8}, "q_proj", "v_proj"),
    ("PhiConfig", "PhiForCausalLM", GROUPED, "q_proj", "v_proj"),
    ("BertConfig", "BertForSequenceClassification", SMALL, "query", "value"),
    ("RobertaConfig", "RobertaForMaskedLM", SMALL, "query", "value"),
    ("ViTConfig", "ViTForImageClassification", SMALL | {"image_size": 8, "patch_size": 4}, "q_proj", "v_proj"),
    ("DebertaV2Config", "DebertaV2ForTokenClassification", SMALL, "query_proj", "value_proj"),
    (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
        "q",
        "v",
    ),
]


def lora_layers(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize(
    ("config", "model", "settings", "query", "value"), FAMILIES, ids=[family[1] for family in FAMILIES]
)
def test_query_and_value_are_found_by_role(config, model, settings, query, value):
    base = getattr(transformers, model)(getattr(transformers, config)(**settings))
    adapted = get_peft_model(base, FisherLoRAConfig())
    layers = lora_layers(adapted)
    assert {name.rpartition(".")[2] for name in layers} == {query, value}
    expected = 0
    for name, layer in layers.items():
        rank = 4 if name.endswith(f".{query}") else 16
        assert layer.lora_A["default"].weight.shape == (rank, layer.in_features), name
        assert layer.lora_B["default"].weight.shape == (layer.out_features, rank), name
        assert layer.scaling["default"] == 2.0
        expected += rank * (layer.in_features + layer.out_features)
    assert adapted.get_nb_trainable_parameters()[0] == expected
    with redirect_stdout(io.StringIO()) as printed:
        adapted.print_trainable_parameters()
    assert f"trainable params: {expected:,} ||" in printed.getvalue()


def test_replicated_layers_have_the_ranks_of_their_own_names(tiny_llama):
    pattern = {r"layers\.0\..*q_proj": 7, r"layers\.3\..*v_proj": 5}
    config = FisherLoRAConfig(r=8, r_q=2, rank_pattern=pattern, layer_replication=[[0, 2], [0, 2]])
    layers = lora_layers(get_peft_model(tiny_llama(), config))
    ranks = {name.removeprefix("model.layers."): layer.r["default"] for name, layer in layers.items()}
    assert [ranks[f"{i}.self_attn.q_proj"] for i in range(4)] == [7, 2, 2, 2]
    assert [ranks[f"{i}.self_attn.v_proj"] for i in range(4)] == [8, 8, 8, 5]


def test_modules_found_by_a_state_dict_have_the_ranks_of_their_roles(tiny_llama, randomize, token_ids):
    config = FisherLoRAConfig(r=8, r_q=2, target_modules=["q_proj", "v_proj"])
    model = randomize(inject_adapter_in_model(config, tiny_llama(), "a"))
    entries = get_peft_model_state_dict(model, adapter_name="a")
    config = FisherLoRAConfig(r=8, r_q=2, target_modules=["o_proj"])
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        other = inject_adapter_in_model(config, tiny_llama(), "b", state_dict=entries)
    set_peft_model_state_dict(other, entries, adapter_name="b")
    assert_close_outputs(other(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


def test_fused_attention_is_refused_by_default_and_accepted_when_asked_for(tiny_gpt2):
    with pytest.raises(ValueError, match=r"'transformer.h.0.attn.c_attn' .*target_modules=\['c_attn'\]"):
        get_peft_model(tiny_gpt2(), FisherLoRAConfig())
    phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED))
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.qkv_proj' .*target_modules=\['qkv_proj'\]"):
        get_peft_model(phi3, FisherLoRAConfig())
    model = get_peft_model(tiny_gpt2(), FisherLoRAConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    assert {layer.r["default"] for layer in lora_layers(model).values()} == {8}


def test_no_query_and_value_at_all_says_what_there_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"found no query and value projections .* named \['0', '2'\]"):
        get_peft_model(model, FisherLoRAConfig())
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert len(lora_layers(get_peft_model(model, FisherLoRAConfig(target_modules=["0"])))) == 1


def test_other_roles_take_r_and_rank_pattern_wins(tiny_llama):
    config = FisherLoRAConfig(
        r=6,
        r_q=2,
        r_v=5,
        lora_alpha=9,
        target_modules="all-linear",
        rank_pattern={r"layers\.1\..*q_proj": 3, "up_proj": 7},
    )
    layers = lora_layers(get_peft_model(tiny_llama(), config))
    ranks = {name.removeprefix("model.layers."): layer.r["default"] for name, layer in layers.items()}
    assert ranks["0.self_attn.q_proj"] == 2
    assert ranks["1.self_attn.q_proj"] == 3
    assert ranks["0.self_attn.v_proj"] == 5
    assert {
        ranks[f"{i}.{name}"]
        for i in (0, 1)
        for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    } == {6}
    assert ranks["0.mlp.up_proj"] == 7
    assert {layer.scaling["default"] for layer in layers.values()} == {1.5}


@pytest.mark.slow
@given(
    r=st.integers(1, 24),
    r_q=st.integers(1, 24),
    r_v=st.none() | st.integers(1, 24),
    alpha=st.none() | st.integers(1, 64),
    rslora=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_scaling_is_the_same_whatever_the_ranks(r, r_q, r_v, alpha, rslora):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(**GROUPED))
    config = FisherLoRAConfig(
        r=r, r_q=r_q, r_v=r_v, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "v_proj", "o_proj"]
    )
    layers = lora_layers(get_peft_model(base, config))
    scaling = (2 * r if alpha is None else alpha) / (math.sqrt(r) if rslora else r)
    wanted = {"q_proj": r_q, "v_proj": r if r_v is None else r_v, "o_proj": r}
    for name, layer in layers.items():
        assert layer.r["default"] == wanted[name.rpartition(".")[2]]
        assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-12)


def test_an_explicit_alpha_pattern_is_that_module_s_alpha_as_in_lora(tiny_llama):
    layers = lora_layers(get_peft_model(tiny_llama(), FisherLoRAConfig(alpha_pattern={"q_proj": 12})))
    assert {n.rpartition(".")[2]: layer.scaling["default"] for n, layer in layers.items()} == {
        "q_proj": 3.0,
        "v_proj": 2.0,
    }


def test_it_is_the_lora_that_its_patterns_say(tiny_llama, randomize, token_ids):
    fisher = randomize(get_peft_model(tiny_llama(), FisherLoRAConfig(r=8, r_q=2))).eval()
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}
    )
    lora = get_peft_model(tiny_llama(), config).eval()
    assert lora.load_state_dict(fisher.state_dict()).missing_keys == []
    assert_close_outputs(fisher(input_ids=token_ids).logits, lora(input_ids=token_ids).logits)
    resolved = fisher.peft_config["default"]
    assert (resolved.rank_pattern, resolved.alpha_pattern) == ({"q_proj": 2}, {"q_proj": 4})
    assert (resolved.lora_alpha, resolved.target_modules) == (16, {"q_proj", "v_proj"})


def test_the_config_passed_in_stays_as_it_was(tiny_llama):
    config = FisherLoRAConfig(rank_pattern={"o_proj": 2}, target_modules="all-linear")
    before = copy.deepcopy(config.__dict__)
    get_peft_model(tiny_llama(), config)
    assert config.__dict__ == before | {"base_model_name_or_path": config.base_model_name_or_path}


@pytest.mark.parametrize("rslora", [False, True])
def test_saving_and_loading_give_the_same_bits(tiny_llama, randomize, token_ids, tmp_path, rslora):
    config = FisherLoRAConfig(use_rslora=rslora, rank_pattern={r"layers\.0\..*v_proj": 3}, task_type="CAUSAL_LM")
    model = randomize(get_peft_model(tiny_llama(), config)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FISHERLORA"
    for first, second in zip(lora_layers(model).values(), lora_layers(loaded).values(), strict=True):
        assert first.scaling == second.scaling


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 16}},
        {"alpha_pattern": {"q_proj": 32}},
        {"rank_pattern": {r"layers\.1\..*q_proj": 16}, "r_v": 3},
        {"rank_pattern": {"q_proj": 16, "v_proj": 4}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True},
    ],
)
def test_entries_that_equal_a_default_survive_the_disk(tiny_llama, randomize, token_ids, tmp_path, options):
    model = randomize(get_peft_model(tiny_llama(), FisherLoRAConfig(task_type="CAUSAL_LM", **options))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)
    for first, second in zip(lora_layers(model).values(), lora_layers(loaded).values(), strict=True):
        assert (first.r, first.scaling) == (second.r, second.scaling)


def test_a_second_adapter_has_its_own_ranks(tiny_llama):
    model = get_peft_model(tiny_llama(), FisherLoRAConfig())
    model.add_adapter("small", FisherLoRAConfig(r=4, r_q=1))
    ranks = {
        (name.rpartition(".")[2], key): rank
        for name, layer in lora_layers(model).items()
        for key, rank in layer.r.items()
    }
    assert ranks == {
        ("q_proj", "default"): 4,
        ("v_proj", "default"): 16,
        ("q_proj", "small"): 1,
        ("v_proj", "small"): 4,
    }


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_weighted_adapter_can_be_saved_and_loaded(tiny_llama, randomize, token_ids, tmp_path, combination):
    model = get_peft_model(tiny_llama(), FisherLoRAConfig(r=8, r_q=2, task_type="CAUSAL_LM"))
    model.add_adapter("b", FisherLoRAConfig(r=8, r_q=2, task_type="CAUSAL_LM"))
    for name in ("default", "b"):
        model.set_adapter(name)
        randomize(model, seed=len(name))
    model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "both", combination_type=combination)
    model.set_adapter("both")
    model.eval()
    expected = model(input_ids=token_ids).logits
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both").eval()
    assert torch.allclose(loaded(input_ids=token_ids).logits, expected, atol=1e-6)


def test_a_pattern_that_matches_nothing_is_warned_of(tiny_llama):
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module.*'nowhere'"):
        get_peft_model(tiny_llama(), FisherLoRAConfig(rank_pattern={"nowhere": 3}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_q": 0}, "FisherLoRA: `r_q` must be a positive integer; got 0"),
        ({"r": 0, "r_q": -1}, "`r` must .* got 0. `r_q` must .* got -1. `r_v` must .* got 0"),
        ({"r_v": 2.5}, "`r_v` must be a positive integer; got 2.5"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` must be a positive integer; got 0"),
    ],
)
def test_bad_ranks_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        FisherLoRAConfig(**options)


def test_a_config_given_for_loading_is_kept_as_it_is_and_gives_the_saved_ranks(
    tiny_llama, randomize, token_ids, tmp_path
):
    """As PEFT keeps it; the ranks are resolved from it all the same."""
    options = {"r": 6, "r_q": 2, "target_modules": ["q_proj", "v_proj"]}
    model = randomize(get_peft_model(tiny_llama(), FisherLoRAConfig(**options))).eval()
    model.save_pretrained(tmp_path)
    config = FisherLoRAConfig(**options)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config).eval()
    assert loaded.peft_config["default"] is config
    assert not config.rank_pattern
    assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()
    assert_close_outputs(again(input_ids=token_ids).logits, model(input_ids=token_ids).logits)
