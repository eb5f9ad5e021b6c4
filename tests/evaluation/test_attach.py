"""Adapters in and out of a base model, which stays as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorakit import SpecLoRAConfig, evaluation
from lorakit.errors import EvaluationError, PatternError, UnsupportedModelError
from lorakit.evaluation._attach import AttachedAdapter, adapted, without_adapters
from lorakit.evaluation._digests import base_digest

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "saved modules": LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "tokens": LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM"),
    "speclora": SpecLoRAConfig(r=2, k=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
IDS = torch.arange(20)[None]


@pytest.fixture(params=CONFIGS)
def adapter(request, home, tmp_path):
    """An adapter of each kind in which every number is random."""
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), CONFIGS[request.param])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.slow
def test_an_adapter_is_what_peft_makes_of_it_and_leaves_its_base_as_it_was(home, adapter):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    plain, flags = logits(base), [p.requires_grad for p in base.parameters()]
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), adapter))
    good = AttachedAdapter(base, home / "good")
    with adapted(base, adapter) as model:
        assert torch.equal(logits(model), expected)
        assert base_digest(model) == base_digest(AutoModelForCausalLM.from_pretrained(home / "base"))
        with good.applied() as other:  # one adapter at a time
            assert not torch.equal(logits(other), expected)
        with without_adapters(base):
            assert torch.equal(logits(base), plain)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(base), plain)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not hasattr(base, "peft_config")


def test_biases_are_put_back(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=2, **shape)).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    base = Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    attached = AttachedAdapter(base, tmp_path / "adapter")
    assert attached.changes_biases
    for _ in range(2):
        assert torch.equal(logits(base), plain)
        with attached.applied() as again:
            assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(base), plain)


def test_the_loader_of_the_commands(home, tmp_path):
    assert isinstance(evaluation.load_adapted(home / "base", home / "good"), PeftModel)
    with pytest.raises(EvaluationError, match="nowhere' cannot be loaded"):
        evaluation.load_adapted(tmp_path / "nowhere", home / "good")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModelError, match="does not say which class"):
        evaluation.load_base(tmp_path, task_type=None)
    with pytest.raises(TypeError, match="`base` must be a path, a Hub id or a model; got int"):
        evaluation.load_base(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat61"}, "`dtype` must be .* a dtype of torch, such as .*; got 'bfloat61'"),
        ({"device": "tpv"}, '`device` must be a device of torch, such as "cpu" or "cuda:0"; got \'tpv\''),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluation.LoadOptions(**options)


@pytest.mark.slow
def test_an_endless_expression_in_the_config_never_reaches_peft(home, tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.naming._config_expressions._SECONDS", 0.5)
    shutil.copytree(home / "good", tmp_path / "endless")
    config = json.loads((tmp_path / "endless" / "adapter_config.json").read_text())
    config["exclude_modules"] = r"([\w.]|\w\w|\w)+\?"
    (tmp_path / "endless" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PatternError, match="takes too long for the names of the base model's modules"):
        evaluation.load_adapted(home / "base", tmp_path / "endless")
