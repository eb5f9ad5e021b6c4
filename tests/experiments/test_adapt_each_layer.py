"""An adapter trained in one layer at a time, against the same training by hand; configs that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from closeness import assert_close_reports
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, get_cosine_schedule_with_warmup, set_seed

from lorakit import FisherLoRAConfig, SpecLoRAConfig, experiments
from lorakit.errors import UnsupportedModelError

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
SETTINGS = {"steps": 3, "batch_size": 2, "learning_rate": 2e-2, "progress": False}


def by_hand(model, layer, data, evaluate, seed):
    """LoRA in one layer by PEFT's own `layers_to_transform`, trained in the seed's order."""
    set_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[layer])
    )
    generator = torch.Generator().manual_seed(seed)
    sampler = torch.utils.data.RandomSampler(data, num_samples=6, generator=generator)
    batches = torch.utils.data.DataLoader(data, 2, sampler=sampler, generator=generator)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SETTINGS["learning_rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 3)
    for batch in batches:
        adapted(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    adapted.eval()
    with torch.no_grad():
        return evaluate(adapted).double()


@pytest.mark.slow
def test_each_layer_is_trained_alone_as_by_hand(tiny_llama, data, evaluate):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = experiments.adapt_each_layer(model, CONFIG, data, evaluate, seeds=(0, 1), **SETTINGS)
    assert [(group.layer, group.modules) for group in found.groups] == [
        (i, (f"model.layers.{i}.self_attn.q_proj", f"model.layers.{i}.self_attn.v_proj")) for i in (0, 1)
    ]
    with torch.no_grad():
        base = evaluate(tiny_llama()).double()
    assert found.base.value == pytest.approx(float(base.mean()), abs=1e-6)
    for group in found.groups:
        gains = torch.stack([base - by_hand(tiny_llama(), group.layer, data, evaluate, seed) for seed in (0, 1)])
        assert abs(float(gains.mean())) > 1e-4
        assert group.gain.value == pytest.approx(float(gains.mean()), abs=1e-6)
        assert group.gain.stderr_seeds == pytest.approx(float(gains.mean(1).std() / 2**0.5), abs=1e-6)
        assert group.gain.stderr_examples == pytest.approx(float(gains.mean(0).std() / 2), abs=1e-6)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("role", ["query", "value"]),
        ("module", [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]),
    ],
)
def test_groups(tiny_llama, data, evaluate, by, names):
    found = experiments.adapt_each_layer(tiny_llama(), CONFIG, data, evaluate, by=by, **SETTINGS)
    assert [group.name for group in found.groups] == names
    assert sum(group.params for group in found.groups) == sum(
        p.numel() for p in get_peft_model(tiny_llama(), CONFIG).parameters() if p.requires_grad
    )
    assert [group.gain.value for group in found.ordered] == sorted(
        (group.gain.value for group in found.groups), reverse=True
    )
    assert found.scores == {group.name: max(0.0, group.gain.value) for group in found.groups}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [FisherLoRAConfig(r=4, r_q=2), SpecLoRAConfig(r=2, k=5, target_modules="all-linear", task_type="CAUSAL_LM")],
    ids=["FISHERLORA", "SPECLORA"],
)
def test_lorakit_configs_keep_their_ranks(tiny_llama, data, evaluate, config):
    found = experiments.adapt_each_layer(tiny_llama(), config, data, evaluate, by="module", **SETTINGS)
    whole = get_peft_model(tiny_llama(), config)
    for group in found.groups:
        layer = whole.get_base_model().get_submodule(group.name)
        assert group.params == sum(p.numel() for p in layer.parameters() if p.requires_grad), group.name


def mixtral():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_layers_of_a_mixture_of_experts_are_adapted_one_by_one(data, evaluate):
    found = experiments.adapt_each_layer(mixtral(), CONFIG, data, evaluate, **SETTINGS)
    assert [group.params for group in found.groups] == [4 * (32 + 32) + 4 * (32 + 16)] * 2


def test_expert_parameters_are_refused(data, evaluate):
    model, calls = mixtral(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="'model.layers.0' cannot be adapted alone: PEFT .* experts"):
        experiments.adapt_each_layer(model, config, data, calls.append, **SETTINGS)
    assert not calls
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_module_whose_name_is_the_end_of_another_name_is_adapted_alone(data):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = Inner()

        def forward(self, x):
            return self.inner.proj(self.proj(x))

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(8))
    found = experiments.adapt_each_layer(
        Outer(),
        LoraConfig(r=2, target_modules=["proj"]),
        data,
        lambda model: model(x).square().mean(1),
        by="module",
        train=lambda model, batches, seed: None,
        **SETTINGS,
    )
    assert [(group.name, group.params) for group in found.groups] == [("proj", 16), ("inner.proj", 16)]


@pytest.mark.slow
def test_an_interrupted_run_continues(tiny_llama, data, evaluate, tmp_path):
    calls = []

    def stops(model):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        experiments.adapt_each_layer(tiny_llama(), CONFIG, data, stops, records=tmp_path, **SETTINGS)
    again = experiments.adapt_each_layer(tiny_llama(), CONFIG, data, stops, records=tmp_path, **SETTINGS)
    assert len(calls) == 4  # base, first layer, interrupted second, second
    whole = experiments.adapt_each_layer(tiny_llama(), CONFIG, data, evaluate, **SETTINGS)
    assert_close_reports(again, whole)


def test_the_report(tiny_llama, data, evaluate):
    found = experiments.adapt_each_layer(tiny_llama(), CONFIG, data, evaluate, **SETTINGS)
    assert found.headline.startswith(f"{found.ordered[0].name} gains most alone: {found.ordered[0].gain} below the")
    assert found.headline.endswith("(2 groups, seeds 0)")
    assert [line.partition(":")[0] for line in found.details] == [group.name for group in found.ordered]
    assert found.to_frame()["gain"].tolist() == [group.gain.value for group in found.groups]
    (axes,) = found.plot().axes
    assert axes.get_title() == "LlamaForCausalLM: each layer adapted alone, 3 steps, 1 seed"
    assert [bar.get_height() for bar in axes.patches] == [group.gain.value for group in found.groups]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1"]
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["groups"][1]["gain"]["value"] == found.groups[1].gain.value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "must be a LORA, FISHERLORA or SPECLORA config"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "it has modules_to_save"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "it has bias"),
    ],
)
def test_configs_that_train_more_than_adapters_are_refused(tiny_llama, data, evaluate, config, message):
    with pytest.raises(ValueError, match=message):
        experiments.adapt_each_layer(tiny_llama(), config, data, evaluate, **SETTINGS)


def test_arguments_of_the_wrong_type_are_refused(tiny_llama, data, evaluate):
    with pytest.raises(TypeError, match="`model` must be a model .* got list"):
        experiments.adapt_each_layer([], CONFIG, data, evaluate, **SETTINGS)
    with pytest.raises(TypeError, match="`evaluate` must be a function of the model; got NoneType"):
        experiments.adapt_each_layer(tiny_llama(), CONFIG, data, None, **SETTINGS)


def test_an_unknown_grouping_is_refused(tiny_llama, data, evaluate):
    with pytest.raises(ValueError, match="`by` must be one of layer, module, role; got 'block'"):
        experiments.adapt_each_layer(tiny_llama(), CONFIG, data, evaluate, by="block", **SETTINGS)
