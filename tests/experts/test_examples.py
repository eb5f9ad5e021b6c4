"""Surgery and the Fisher probe on experts: exact where experts are modules, refused by name where they are stacked."""

from __future__ import annotations

import copy

import pytest
import torch

from lorakit import fisher, surgery
from lorakit.errors import UnsupportedModelError

from .conftest import TARGETS, adapted
from .test_looking import routed

pytestmark = pytest.mark.slow


def losses(model, batch):
    return model(batch).square().mean((1, 2))


def batches():
    torch.manual_seed(5)
    return [torch.randn(3, 4, 8), torch.randn(2, 1, 8), torch.randn(1, 6, 8)]


def gradients(model, of):
    """One backward pass for each example: the gradient of each parameter in `of`, by name."""
    found = []
    for batch in batches():
        for example in batch:
            model.zero_grad()
            losses(model, example[None])[0].backward()
            parameters = dict(model.named_parameters())
            found.append(
                {name: torch.zeros_like(p) if (p := parameters[name]).grad is None else p.grad.clone() for name in of}
            )
    return found


def test_the_probe_is_exact_on_experts_that_are_modules():
    model = routed()
    names = [name for name, _ in model.named_modules() if name.endswith("lora_B.default")]
    expected = gradients(copy.deepcopy(model), [f"{name}.weight" for name in names])
    report = fisher.probe(model, batches(), target_modules=["w1", "w2"], loss_fn=losses, progress=False)
    assert len(report.modules) == len(names) == 12
    for row in report.modules:
        name = f"base_model.model.{row.module_name}.lora_B.default.weight"
        squares = [float(each[name].double().square().mean()) for each in expected]
        assert row.fisher == pytest.approx(sum(squares) / len(squares), rel=1e-4, abs=1e-12)


def test_sensitivities_are_exact_on_experts_that_are_modules():
    model = routed()
    report = surgery.sensitivity(
        model, batches(), target_modules=["w1", "w2"], aggregate="mean", loss_fn=losses, progress=False
    )
    factors = [
        f"{name}.weight" for name, _ in model.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))
    ]
    expected = gradients(copy.deepcopy(model), factors)
    layers = dict(model.named_modules())
    assert len(report.modules) == 12
    for row in report.modules:
        layer = layers[f"base_model.model.{row.module_name}"]
        A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        s = layer.scaling["default"]
        U, S, Vh = torch.linalg.svd(s * B @ A, full_matrices=False)
        # ∂ℓ/∂B = s G Aᵀ and Vh lies in the rows of A, so uᵀ G v = uᵀ (∂ℓ/∂B / s) (A⁺)ᵀ … v
        inverse = torch.linalg.pinv(A)
        per_example = []
        for each in expected:
            G_A = each[f"base_model.model.{row.module_name}.lora_B.default.weight"].double() / s  # G Aᵀ
            per_example.append((U[:, :2].mT @ G_A @ inverse.mT @ Vh[:2].mT).diagonal())
        torch.testing.assert_close(
            torch.tensor(row.sensitivity, dtype=torch.float64), torch.stack(per_example).mean(0), rtol=1e-4, atol=1e-7
        )


def test_stacked_experts_are_refused_by_name(mixtral):
    model = adapted(mixtral)
    ids = torch.arange(12).reshape(2, 6)
    loader = [{"input_ids": ids, "labels": ids}]
    message = (
        r"in 4 adapted parameters .*: model\.layers\.0\.mlp\.experts\.\w+_proj, .*Leave them out of `target_modules`"
    )
    with pytest.raises(UnsupportedModelError, match=f"Surgery must tell examples apart, .*{message}"):
        surgery.sensitivity(model, loader, target_modules=".*experts.*", progress=False)
    with pytest.raises(UnsupportedModelError, match=f"The probe must tell examples apart, .*{message}"):
        fisher.probe(model, loader, target_modules=".*experts.*", progress=False)


def test_the_defaults_leave_stacked_experts_out_and_say_so(mixtral):
    model = adapted(mixtral, target_modules=["q_proj", "o_proj"])
    ids = torch.arange(12).reshape(2, 6)
    loader = [{"input_ids": ids, "labels": ids}]
    names = {f"model.layers.{i}.mlp.{target}" for i in range(2) for target in TARGETS}
    with pytest.warns(UserWarning, match="leaves out 4 stacks of experts") as caught:
        report = surgery.sensitivity(model, loader, progress=False)
    assert caught[0].filename == __file__
    assert {row.module_name for row in report.modules} == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    assert set(fisher.probe(model, loader, progress=False).unprobed) == names
