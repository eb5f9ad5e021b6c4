"""The sensitivity S(k) of SpecLoRA's masks against one backward per example through the paper's W', and configs."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.allocation import masks_from_probe
from lorakit.errors import AllocationError, UnsupportedModelError
from lorakit.fisher import probe
from lorakit.fisher._probe import LADDER
from lorakit.tuners.speclora import MODES

NAMES = ("q_proj", "v_proj", "o_proj")
KS = (1, 3, 4, 6)


class Model(nn.Module):
    """Three linear layers of which the last is wide and stores its weight transposed; q_proj runs twice."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(9, 6), nn.Linear(9, 6), Conv1D(11, 6)

    def forward(self, x):
        return self.o_proj(self.q_proj(x).tanh() * self.v_proj(x) + self.q_proj(x.flip(1)).square())


def loss_fn(model, batch):
    return model(batch).sin().mean((1, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model().double()
    nn.init.normal_(model.o_proj.weight, std=0.3)
    return model


@pytest.fixture
def examples():
    return torch.randn(5, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rescaled(W, d, mode):
    """W' of the paper's Eq. 4 to 8, from a full SVD and from Γ written out."""
    (d_out, d_in), k = W.shape, len(d)
    if mode.startswith("hadamard"):
        gamma = torch.ones_like(W)
        rows, columns = (slice(k), slice(k)) if mode == "hadamard" else (slice(d_out - k, None), slice(d_in - k, None))
        gamma = gamma.clone()
        gamma[rows, columns] = d[:, None].expand(k, k)
        return gamma * W
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    chosen = slice(k) if mode == "svd" else slice(len(S) - k, None)
    part = U[:, chosen] * S[chosen] @ Vh[chosen]
    return W - part + torch.cat([d[:, None] * part[:k], part[k:]])


def one_backward_each(model, examples, mode, ks):
    """S(k) of each module from autograd's gradient of d, one example and one k at a time."""
    found = {}
    for name in NAMES:
        layer = getattr(model, name)
        W = layer.weight.detach()
        W = W.T if isinstance(layer, Conv1D) else W
        for k in ks:
            k = min(k, *W.shape)
            total = 0.0
            for x in examples:
                d = torch.ones(k, dtype=W.dtype, requires_grad=True)
                changed = rescaled(W, d, mode)
                changed = changed.T if isinstance(layer, Conv1D) else changed
                out = functional_call(model, {f"{name}.weight": changed}, (x[None],))
                (gradient,) = torch.autograd.grad(out.sin().mean(), d)
                total += float(gradient.square().sum())
            found[name, k] = total / len(examples)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_s_is_that_of_one_backward_per_example(model, examples, mode, size):
    expected = one_backward_each(model, examples, mode, KS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = probe(
        model,
        list(examples.split(size)),
        target_modules=list(NAMES),
        loss_fn=loss_fn,
        progress=False,
        method="speclora",
        mode=mode,
        ladder=KS,
    )
    found = {(row.module_name, step.k): step.sensitivity for row in report.modules for step in row.mask}
    assert found == pytest.approx(expected, rel=1e-10)
    assert report.mode == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["hadamard", "svd"])
def test_s_is_that_of_a_speclora_s_own_gradient_at_any_d(model, examples, mode):
    config = SpecLoRAConfig(r=2, k=4, mode=mode, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    report = probe(adapted, [examples], loss_fn=loss_fn, progress=False, method="speclora", mode=mode, ladder=(4,))
    for row in report.modules:
        d = getattr(adapted.base_model.model, row.module_name).lora_spec["default"].weight
        gradients = [torch.autograd.grad(loss_fn(adapted, x[None]).sum(), d)[0] for x in examples]
        S = float(torch.stack(gradients).square().sum(1).mean())
        assert row.mask[0].sensitivity == pytest.approx(S, rel=1e-10)


def test_the_standard_error_is_that_of_the_examples(model, examples):
    def measured(batch):
        report = probe(model, [batch], loss_fn=loss_fn, progress=False, method="speclora", ladder=(5,))
        return report.modules[0].mask[0]

    singles = torch.tensor([measured(x[None]).sensitivity for x in examples], dtype=torch.float64)
    assert measured(examples).stderr == pytest.approx(float(singles.std() / 5**0.5), rel=1e-9)
    assert measured(examples[:1]).stderr is None


def test_fisher_information_is_the_same_with_and_without_masks(model, examples):
    plain, masked = (
        probe(model, [examples], loss_fn=loss_fn, progress=False, method=method, factors=("B", "weight"))
        for method in ("fisherlora", "speclora")
    )
    assert [row.fisher for row in plain.modules] == [row.fisher for row in masked.modules]
    assert [row.weight for row in plain.modules] == [row.weight for row in masked.modules]
    assert plain.mode is None
    assert all(row.mask == () for row in plain.modules)
    assert [step.k for step in masked.modules[0].mask] == [1, 6]  # the default ladder, clipped to the smaller side
    assert LADDER[:3] == (1, 25, 50)
    assert LADDER[-1] == 400
    data = json.loads(json.dumps(masked.to_dict(), allow_nan=False))
    assert data["modules"][0]["mask"][0]["k"] == 1
    assert masked.next_steps[0].endswith("SpecLoRAConfig.from_probe(report, k=200)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "`method` must be one of fisherlora, speclora; got 'lora'"),
        ({"method": "speclora", "mode": "top"}, "`mode` must be one of hadamard"),
        ({"method": "speclora", "ladder": ()}, "`ladder` must have at least one k"),
        ({"method": "speclora", "ladder": (0, 4)}, "`ladder` must be a positive integer; got 0"),
    ],
)
def test_wrong_options_are_refused(model, examples, options, message):
    with pytest.raises(ValueError, match=message):
        probe(model, [examples], loss_fn=loss_fn, progress=False, **options)


def test_a_scaling_of_0_hides_the_masks(model, examples):
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=0, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="method='speclora'"):
        probe(adapted, [examples], loss_fn=loss_fn, progress=False, method="speclora")


@pytest.mark.parametrize("mode", MODES)
def test_a_config_from_a_probe_trains_the_allocated_ks(model, examples, tmp_path, mode):
    report = probe(
        model, [examples], target_modules=list(NAMES), loss_fn=loss_fn, progress=False, method="speclora", mode=mode,
        ladder=range(1, 7),
    )  # fmt: skip
    allocation = masks_from_probe(report, budget=0.5, k=4)
    assert allocation.budget == 6  # half of 3 · 4
    config = SpecLoRAConfig.from_probe(report, budget=0.5, k=4, r=2)
    assert config.mode == mode
    adapted = get_peft_model(model, config)
    layers = {name: getattr(adapted.base_model.model, name) for name in NAMES}
    assert {name: layer.lora_spec["default"].k for name, layer in layers.items()} == allocation.ks
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Model().double(), tmp_path)
    assert loaded.peft_config["default"].k_pattern == config.k_pattern


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0.5, "params": 10}, ValueError, "exclude each other"),
        ({"budget": 2.0}, ValueError, r"`budget` must be a fraction in \(0, 1\] of uniform k = 200"),
        ({"params": 1}, AllocationError, r"`budget` must cover the smallest k of all 2 modules \(at least 2\); got 1"),
        ({"k": 0}, ValueError, "`k` must be a positive integer"),
        ({"mode": "svd"}, ValueError, r"`from_probe` sets \['mode'\] itself"),
    ],
)
def test_a_config_from_a_probe_refuses_what_makes_no_sense(model, examples, settings, error, message):
    report = probe(model, [examples], loss_fn=loss_fn, progress=False, method="speclora")
    with pytest.raises(error, match=message):
        SpecLoRAConfig.from_probe(report, **settings)


def test_a_report_without_masks_makes_no_speclora(model, examples):
    report = probe(model, [examples], loss_fn=loss_fn, progress=False)
    with pytest.raises(AllocationError, match="Probe with method='speclora'"):
        SpecLoRAConfig.from_probe(report)


def test_any_report_with_the_protocol_s_parts_makes_a_config():
    class Row:
        role, d_out, d_in, fisher = None, 8, 8, 1.0

        def __init__(self, name):
            self.module_name = name
            self.mask = (Step(1, 0.0), Step(4, 2.0))

    class Step:
        def __init__(self, k, sensitivity):
            self.k, self.sensitivity = k, sensitivity

    class Mine:
        modules, target_modules, mode, vq_interval = (Row("a"), Row("b")), ("a", "b"), "svd", None

    assert SpecLoRAConfig.from_probe(Mine(), params=5, k=4).k_pattern == {"b": 1}
    assert FisherLoRAConfig.from_probe(Mine(), budget=1.0, r=4).r == 4
