"""Groups of an adapter switched off and on, against models built without them; the model is left as it was."""

from __future__ import annotations

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from closeness import assert_close_reports
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from lorakit import FisherLoRAConfig, SpecLoRAConfig, experiments
from lorakit.allocation import allocate
from lorakit.errors import CalibrationError, UnsupportedModelError
from lorakit.naming.roles import layer_of, role_of

LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CONFIGS = {
    "lora": LoraConfig(**LINEAR),
    "dora": LoraConfig(**LINEAR, use_dora=True),
    "fisherlora": FisherLoRAConfig(r=4, r_q=2),
    "speclora": SpecLoRAConfig(**LINEAR, k=8),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "lm_head"]),
}


def losses(ids):
    """An `evaluate` that returns the mean token loss of each example."""

    def evaluate(model):
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)

    return evaluate


def without(model, unwanted):
    """A copy whose adapted modules are replaced by their base layers, where `unwanted(name)` says so."""
    model = copy.deepcopy(model)
    base = model.get_base_model()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, BaseTunerLayer) and unwanted(name):
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, layer.get_base_layer())
    return model


def mean_and_stderr(values):
    values = np.asarray(values, dtype=np.float64)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


@pytest.fixture
def ids():
    return torch.randint(1, 64, (5, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ablate", "adapt"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_against_models_built_without_them(kind, mode, tiny_llama, randomize, ids):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS[kind]))
    evaluate = losses(ids)
    found = experiments.layer_sensitivity(model, evaluate, mode=mode)
    whole, none = evaluate(model), evaluate(without(model, lambda name: True))
    assert found.whole.value == pytest.approx(whole.mean().item(), rel=1e-6)
    assert found.without.value == pytest.approx(none.mean().item(), rel=1e-6)
    assert (found.effect.value, found.effect.stderr) == pytest.approx(
        mean_and_stderr((whole - none).detach()), rel=1e-4
    )
    layers = [group.layer for group in found.groups]
    assert layers == ([None, 0, 1, None] if kind == "embedding" else [0, 1])
    for group in found.groups:
        if mode == "ablate":
            reference, total = whole, none - whole
            expected = evaluate(without(model, lambda name: name in group.modules))  # noqa: B023
        else:
            reference, total = none, whole - none
            expected = evaluate(without(model, lambda name: name not in group.modules))  # noqa: B023
        delta = (expected - reference).detach()
        assert group.loss.value == pytest.approx(expected.mean().item(), rel=1e-6)
        assert (group.delta.value, group.delta.stderr) == pytest.approx(mean_and_stderr(delta), rel=1e-3, abs=1e-7)
        assert group.share == pytest.approx((delta.mean() / total.mean()).item(), rel=1e-3, abs=1e-6)
        assert abs(group.delta.value) > 1e-5
        own = [m for n, m in model.get_base_model().named_modules() if n in group.modules]
        assert group.params == sum(p.numel() for m in own for p in m.parameters() if p.requires_grad)


def test_ablating_a_layer_equals_zeroing_its_lora_b(tiny_llama, randomize, ids):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["lora"]))
    found = experiments.layer_sensitivity(model, losses(ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "lora_B" in name:
                parameter.zero_()
    assert found.groups[1].loss.value == pytest.approx(losses(ids)(model).mean().item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["module", "role"])
def test_modules_and_roles(by, tiny_llama, randomize, ids):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["lora"]))
    found = experiments.layer_sensitivity(model, losses(ids), by=by)
    names = [name for name, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]
    assert [name for group in found.groups for name in group.modules] == (
        names
        if by == "module"
        else sorted(names, key=lambda n: ([role_of(m) for m in names].index(role_of(n)), layer_of(n)))
    )
    for group in found.groups:
        assert group.name == (group.modules[0] if by == "module" else group.role)
        assert group.layer == (layer_of(group.name) if by == "module" else None)
        expected = losses(ids)(without(model, lambda name: name in group.modules)).mean()  # noqa: B023
        assert group.loss.value == pytest.approx(expected.item(), rel=1e-6)
    # scores for the prior r ∝ s √(d_in + d_out)
    if by == "module":
        scores = {group.name: max(0.0, group.delta.value) for group in found.groups}
        costs = {group.name: group.params // 4 for group in found.groups}
        assert allocate(scores, costs, sum(costs.values()) * 4, rule="prior").cost <= sum(costs.values()) * 4


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def test_a_router_is_grouped_by_its_module_name(ids):
    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = experiments.layer_sensitivity(model, losses(ids), by="role")
    assert [group.name for group in found.groups][4:] == ["gate", "down", "fused_gate_up"]
    assert found.groups[4].modules == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")


def test_parameters_of_experts(randomize, ids):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    randomize(model)
    found = experiments.layer_sensitivity(model, losses(ids), by="module")
    assert sorted(group.name for group in found.groups) == sorted(
        f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.q_proj", *targets)
    )
    for group in found.groups:
        changed = copy.deepcopy(model)
        for name, layer in changed.get_base_model().named_modules():
            own = name.replace(".base_layer", "")
            if isinstance(layer, BaseTunerLayer) and group.name in (
                own,
                f"{own}.{getattr(layer, 'parameter_name', '')}",
            ):
                nn.init.zeros_(layer.lora_B["default"].weight)
        assert group.loss.value == pytest.approx(losses(ids)(changed).mean().item(), rel=1e-6)
        assert abs(group.delta.value) > 1e-6


class Mixed(nn.Module):
    """Convolutions and an attention of torch's own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).mT
        return self.out(self.attn(x, x, x)[0])


def test_convolutions_and_attention_with_its_projections(randomize):
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["conv", "attn", "out"]))
    randomize(model)
    found = experiments.layer_sensitivity(model, lambda m: m(x).square().mean((1, 2)))
    assert [group.name for group in found.groups] == ["conv", "attn", "out"]
    for group in found.groups:
        changed = copy.deepcopy(model)
        for name, parameter in changed.named_parameters():
            if f"model.{group.name}." in name and "lora_B" in name:
                nn.init.zeros_(parameter)
        assert group.loss.value == pytest.approx(changed(x).square().mean().item(), rel=1e-5)
        assert abs(group.delta.value) > 1e-6


def test_layers_with_the_same_index_in_two_stacks_are_separate_groups(randomize):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model = randomize(get_peft_model(T5ForConditionalGeneration(config).eval(), LoraConfig(r=2, target_modules=["q"])))
    ids = torch.arange(1, 6)[None]
    found = experiments.layer_sensitivity(model, lambda m: m(input_ids=ids, labels=ids).loss)
    assert [group.name for group in found.groups] == ["encoder.block.0", "decoder.block.0"]
    assert (found.num_examples, found.groups[0].delta.stderr) == (1, None)
    assert found.plot().axes[0].get_xlabel() == "layer"


def snapshot(model):
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [(layer._disable_adapters, copy.copy(layer._active_adapter)) for layer in layers],
        [id(module) for module in model.modules()],
        (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    )


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize("fails_at", [None, 1, 2, 4])
def test_the_model_is_restored(fails_at, tiny_llama, randomize, ids):
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    randomize(model)
    model.base_model.model.model.layers[0].train()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers[0].enable_adapters(False)  # as a user may have left it
    layers[1].lora_A["default"].requires_grad_(False)
    calls = []

    def evaluate(m):
        calls.append((m.training, torch.is_grad_enabled(), float(torch.rand(())), random.random()))
        if len(calls) == fails_at:
            raise KeyError("evaluation")
        return losses(ids)(m)

    before = snapshot(model)
    if fails_at is None:
        found = experiments.layer_sensitivity(model, evaluate, adapter_name="other", by="role")
        assert [group.name for group in found.groups] == ["query", "output"]
        assert len(calls) == 4
    else:
        with pytest.raises(KeyError, match="evaluation"):
            experiments.layer_sensitivity(model, evaluate, adapter_name="other", by="role")
    assert_same(before, snapshot(model))
    assert set(calls) == {
        (False, False, *calls[0][2:])
    }  # without gradients, in eval mode, with the same random numbers


def test_another_adapter_than_the_active_one(tiny_llama, randomize, ids):
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    found = experiments.layer_sensitivity(model, losses(ids), adapter_name="other")
    assert found.adapter_name == "other"
    assert found.always_on == ("lm_head",)
    model.set_adapter("other")
    assert_close_reports(experiments.layer_sensitivity(model, losses(ids)), found)
    assert found.whole.value == pytest.approx(losses(ids)(model).mean().item(), rel=1e-6)
    # the output layer trained in full stays on where the adapter is off
    plain = without(model, lambda name: True)
    assert found.without.value == pytest.approx(losses(ids)(plain).mean().item(), rel=1e-6)
    assert plain.base_model.model.lm_head.active_adapters == ["other"]


def test_a_model_that_is_not_a_peft_model(tiny_llama, randomize, ids):
    model = tiny_llama()
    inject_adapter_in_model(CONFIGS["lora"], model)
    randomize(model)
    found = experiments.layer_sensitivity(model, lambda m: losses(ids)(m).tolist())
    assert [group.name for group in found.groups] == ["model.layers.0", "model.layers.1"]
    assert found.groups[0].delta.stderr > 0


def test_an_adapter_without_effect_has_no_shares(tiny_llama, ids):
    found = experiments.layer_sensitivity(get_peft_model(tiny_llama(), CONFIGS["lora"]), losses(ids))
    assert found.effect.value == 0
    assert [(group.delta.value, group.share) for group in found.groups] == [(0, None)] * 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2, 2), r"shape \(2, 2\)"),
        (torch.ones(0), r"shape \(0,\)"),
        ("loss", "returned str"),
        (None, "returned NoneType"),
        ([1.0, math.nan], r"for the whole adapter 1 of 2 are NaN or infinite"),
    ],
)
def test_invalid_results_of_evaluate_are_refused(returned, message, tiny_llama):
    model = get_peft_model(tiny_llama(), CONFIGS["lora"])
    with pytest.raises(CalibrationError, match=message):
        experiments.layer_sensitivity(model, lambda m: returned)


def test_evaluate_must_return_the_same_examples_each_time(tiny_llama):
    counts = iter([3, 2])
    with pytest.raises(
        CalibrationError, match="same examples each time; for the model without the adapter .* 2, before 3"
    ):
        experiments.layer_sensitivity(get_peft_model(tiny_llama(), CONFIGS["lora"]), lambda m: torch.ones(next(counts)))


def test_invalid_arguments_are_refused(tiny_llama, ids):
    evaluate = losses(ids)
    with pytest.raises(TypeError, match="`model` must be a model .* got str"):
        experiments.layer_sensitivity("model/", evaluate)
    with pytest.raises(TypeError, match="`evaluate` must be a function of the model; got float"):
        experiments.layer_sensitivity(get_peft_model(tiny_llama(), CONFIGS["lora"]), 1.0)
    with pytest.raises(UnsupportedModelError, match="`model` must have adapted layers to switch; it has none"):
        experiments.layer_sensitivity(tiny_llama(), evaluate)
    model = get_peft_model(tiny_llama(), CONFIGS["lora"])
    with pytest.raises(ValueError, match="`mode` must be one of ablate, adapt; got 'off'"):
        experiments.layer_sensitivity(model, evaluate, mode="off")
    with pytest.raises(ValueError, match="`by` must be one of layer, module, role; got 'head'"):
        experiments.layer_sensitivity(model, evaluate, by="head")
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['default'\]; got 'none'"):
        experiments.layer_sensitivity(model, evaluate, adapter_name="none")
    model.add_adapter("other", CONFIGS["lora"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active are \['default', 'other'\]"):
        experiments.layer_sensitivity(model, evaluate)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="merged into 14 modules .*cannot be switched off.*unmerge_adapter"):
        experiments.layer_sensitivity(model, evaluate)


@pytest.mark.parametrize("by", ["layer", "role", "module"])
def test_plot_and_json(by, tiny_llama, randomize, ids):
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])))
    found = experiments.layer_sensitivity(model, losses(ids), by=by)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["groups"][0]["delta"] == {"value": found.groups[0].delta.value, "stderr": found.groups[0].delta.stderr}
    assert read["by"] == by
    (axes,) = found.plot().axes
    if by == "module":
        drawn = [container[0].get_ydata() for container in axes.containers]
        assert sorted(np.concatenate(drawn)) == sorted(group.delta.value for group in found.groups)
    else:
        bars = next(c for c in axes.containers if type(c).__name__ == "BarContainer")
        assert [bar.get_height() for bar in bars] == [group.delta.value for group in found.groups]


def test_the_report(tiny_llama, randomize, ids):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["lora"]))
    found = experiments.layer_sensitivity(model, losses(ids), by="module")
    assert found.headline.startswith(f"adapter 'default' changes the loss by {found.effect}, from {found.without}")
    assert found.headline.endswith("(5 losses)")
    largest = max(found.groups, key=lambda group: abs(group.delta.value))
    assert found.details[0].startswith(f"{largest.name} off: {largest.delta}, ")
    assert found.details[-1] == "9 more, with smaller changes"
    assert found.to_frame()["delta"].tolist() == [group.delta.value for group in found.groups]
    assert len(repr(found).splitlines()) <= 10
    assert found.plot().axes[0].get_title() == "Adapter 'default': each module switched off, 5 losses"
