"""Snapshots of an adapter in training and the gradients watched with them, against dense references."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import GPT2Config, GPT2LMHeadModel

from lorakit import FisherLoRAConfig, SpecLoRAConfig, lens
from lorakit.errors import UnsupportedModelError
from lorakit.lens import Snapshot
from lorakit.lens.training.gradients import _Probe

CONFIGS = {
    "LORA": lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "RSLORA": lambda: LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"]
    ),
    "DORA": lambda: LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "FISHERLORA": lambda: FisherLoRAConfig(r=5, r_q=2, task_type="CAUSAL_LM"),
    "SPECLORA": lambda: SpecLoRAConfig(r=4, k=7, target_modules="all-linear", task_type="CAUSAL_LM"),
}


@pytest.fixture(params=list(CONFIGS))
def adapted(request, tiny_llama, randomize):
    return randomize(get_peft_model(tiny_llama(), CONFIGS[request.param]()))


@pytest.fixture
def batch():
    ids = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def layers_of(model, adapter="default"):
    return {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A") and adapter in layer.lora_A
    }


def numpy_update(layer, adapter="default"):
    B, A = (part[adapter].weight.detach().double().numpy() for part in (layer.lora_B, layer.lora_A))
    return layer.scaling[adapter] * B @ A


def reference(update, rank):
    """Effective rank, stable rank and capacity utilization by the papers' formulas."""
    sigma = np.linalg.svd(update, compute_uv=False)[:rank]
    p = sigma / sigma.sum()
    effective = math.exp(-sum(x * math.log(x) for x in p if x > 0))
    return {
        "effective_rank": effective,
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "capacity_utilization": effective / rank,
        "frobenius_norm": math.sqrt((sigma**2).sum()),
        "spectral_norm": sigma[0],
    }


def dense_gradient(layer, model, batch):
    """∂ loss / ∂ W, formed in full: of the base weight, or of the effective weight if that is not W + ΔW."""
    if layer.use_dora["default"] or hasattr(layer, "lora_spec"):
        seen = []
        handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        loss = model(**batch).loss
        handle.remove()
        [(x, output)] = seen
        (delta,) = torch.autograd.grad(loss, [output])
        return torch.einsum("nto,nti->oi", delta.double(), x.double()).detach()
    weight = layer.get_base_layer().weight
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(**batch).loss, [weight])
    weight.requires_grad_(False)
    return gradient.double()


def test_numbers_of_every_module_against_the_formulas(adapted):
    seen = lens.snapshot(adapted, step=7)
    layers = layers_of(adapted)
    assert [row.module_name for row in seen.modules] == list(layers)
    assert seen.step == 7
    for row in seen.modules:
        layer = layers[row.module_name]
        rank = layer.r["default"]
        assert row.rank == rank
        for name, value in reference(numpy_update(layer), rank).items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-5), (row.module_name, name)
        assert row.kappa is None
    values = [row.capacity_utilization for row in seen.modules]
    assert seen.total.capacity_utilization == pytest.approx(np.mean(values))
    means = {
        role: np.mean([row.capacity_utilization for row in seen.modules if row.role == role])
        for role in ("query", "value")
    }
    assert seen.role("query").capacity_utilization == pytest.approx(means["query"])
    assert seen.qv_gap == pytest.approx(means["query"] - means["value"])


def test_fresh_adapters_have_no_utilization(tiny_llama):
    seen = lens.snapshot(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    assert {row.capacity_utilization for row in seen.modules} == {0.0}
    assert seen.qv_gap == 0


def test_no_gap_without_queries(tiny_llama, randomize):
    seen = lens.snapshot(randomize(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"]))))
    assert seen.qv_gap is None
    assert seen.role("query") is None
    assert "spectral/qv_gap" not in seen.metrics()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_module_has_no_numbers_and_does_not_affect_others(tiny_llama, randomize, bad):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    whole = lens.snapshot(model)
    name, layer = next(iter(layers_of(model).items()))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = bad
    seen = lens.snapshot(model)
    rows = {row.module_name: row for row in seen.modules}
    assert rows[name].effective_rank is None
    for row in whole.modules:
        if row.module_name != name:
            assert rows[row.module_name].effective_rank == pytest.approx(row.effective_rank, rel=1e-6)
    json.dumps(seen.to_dict(), allow_nan=False)


def test_bfloat16_is_computed_in_full_precision(tiny_llama, randomize):
    model = randomize(get_peft_model(tiny_llama(torch.bfloat16), CONFIGS["LORA"](), autocast_adapter_dtype=False))
    layers = layers_of(model)
    assert next(iter(layers.values())).lora_A["default"].weight.dtype == torch.bfloat16
    for row in lens.snapshot(model).modules:
        expected = reference(numpy_update(layers[row.module_name]), 4)
        assert row.effective_rank == pytest.approx(expected["effective_rank"], rel=1e-5)


def test_embeddings_convolutions_and_conv1d(randomize):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv, self.lin = nn.Embedding(11, 6), nn.Conv1d(6, 5, 3), nn.Linear(5, 4)

        def forward(self, ids):
            return self.lin(self.conv(self.emb(ids).mT).mT)

    model = randomize(get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["emb", "conv", "lin"])))
    seen = {row.module_name: row for row in lens.snapshot(model).modules}
    layer = model.get_base_model().conv
    B, A = (part["default"].weight.detach().double().numpy() for part in (layer.lora_B, layer.lora_A))
    update = layer.scaling["default"] * B[:, :, 0] @ A.reshape(2, -1)
    assert seen["conv"].effective_rank == pytest.approx(reference(update, 2)["effective_rank"], rel=1e-5)
    layer = model.get_base_model().emb
    update = (layer.scaling["default"] * layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).detach()
    assert seen["emb"].effective_rank == pytest.approx(
        reference(update.double().numpy(), 2)["effective_rank"], rel=1e-5
    )
    ids = torch.randint(0, 11, (2, 7))
    with lens.watch_gradients(model) as gradients:
        model(ids).square().mean().backward()
    assert set(gradients.overlaps) == {"lin"}


def test_experts_are_one_row_of_medians(randomize):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.einsum("nd,edo->no", x, self.weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.lin = Experts(), nn.Linear(5, 4)

        def forward(self, x):
            return self.lin(self.experts(x))

    config = LoraConfig(r=2, target_modules=["lin"], target_parameters=["experts.weight"])
    model = randomize(get_peft_model(Model(), config))
    seen = lens.snapshot(model)
    assert [(row.module_name, row.rank) for row in seen.modules] == [("experts", 2), ("lin", 2)]
    assert seen.unmeasured == ()
    layer = model.base_model.model.experts
    A, B = (getattr(layer, half)["default"].weight.detach().double().numpy() for half in ("lora_A", "lora_B"))
    updates = [layer.scaling["default"] * B[:, e::3] @ A[2 * e : 2 * e + 2] for e in range(3)]
    expected = [reference(update, 2) for update in updates]
    row = seen.modules[0]
    for name in ("effective_rank", "stable_rank", "capacity_utilization"):
        assert getattr(row, name) == pytest.approx(statistics.median(one[name] for one in expected), rel=1e-5)
    assert row.frobenius_norm == pytest.approx(np.linalg.norm(np.stack(updates)), rel=1e-5)
    assert row.spectral_norm == pytest.approx(max(np.linalg.norm(update, 2) for update in updates), rel=1e-5)
    with torch.no_grad():
        layer.lora_A["default"].weight[0] = float("nan")
    assert lens.snapshot(model).modules[0].effective_rank is None


def test_a_model_with_add_adapter_of_transformers(tiny_llama, randomize):
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), "mine")
    randomize(model)
    seen = lens.snapshot(model)
    assert len(seen.modules) == 4
    layer = model.model.layers[0].self_attn.q_proj
    expected = reference(numpy_update(layer, "mine"), 3)
    assert seen.modules[0].effective_rank == pytest.approx(expected["effective_rank"], rel=1e-5)
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['mine'\]; got 'yours'"):
        lens.snapshot(model, adapter_name="yours")


def test_one_of_several_adapters(tiny_llama, randomize):
    model = get_peft_model(tiny_llama(), CONFIGS["LORA"]())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    randomize(model)
    assert {row.role for row in lens.snapshot(model, adapter_name="other").modules} == {"value"}
    assert len(lens.snapshot(model).modules) == 14


def test_models_without_a_lora_adapter_are_refused(tiny_llama):
    with pytest.raises(TypeError, match="must be a peft.PeftModel; got LlamaForCausalLM"):
        lens.snapshot(tiny_llama())
    from peft import AdaLoraConfig, IA3Config

    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(UnsupportedModelError, match="IA3"):
        lens.snapshot(model)
    model = tiny_llama()
    model.add_adapter(AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="ADALORA"):
        lens.snapshot(model)


def test_weights_partitioned_by_deepspeed_are_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), CONFIGS["LORA"]())
    for parameter in model.parameters():  # as ZeRO-3 leaves them between passes
        parameter.data, parameter.ds_id = torch.empty(0), 1
    with pytest.raises(UnsupportedModelError, match="ZeRO-3.*Use ZeRO-2 or fully_shard"):
        lens.snapshot(model)


def test_snapshots_survive_json(adapted, batch):
    with lens.watch_gradients(adapted) as gradients:
        adapted(**batch).loss.backward()
    seen = lens.snapshot(adapted, step=3, gradients=gradients)
    assert Snapshot.from_dict(json.loads(json.dumps(seen.to_dict(), allow_nan=False))) == seen
    with pytest.raises(ValueError, match="not a snapshot of an adapter"):
        Snapshot.from_dict({"step": 1})


def test_metrics_have_one_name_each(adapted):
    seen = lens.snapshot(adapted)
    metrics = seen.metrics("modules")
    assert metrics["spectral/cu_query"] == seen.role("query").capacity_utilization
    assert metrics["spectral/cu"] == seen.total.capacity_utilization
    first = seen.modules[0]
    assert metrics[f"spectral/stable_rank/{first.module_name}"] == first.stable_rank
    assert set(seen.metrics()) < set(seen.metrics("roles")) < set(metrics)
    assert set(seen.metrics()) <= {"spectral/cu", "spectral/qv_gap", "spectral/kappa"}


# gradients


@pytest.mark.slow
def test_kappa_against_the_dense_gradient(adapted, batch):
    with lens.watch_gradients(adapted, projections=16384) as gradients:
        adapted(**batch).loss.backward()
    seen = lens.snapshot(adapted, gradients=gradients)
    layers = layers_of(adapted)
    for row in seen.modules:
        G = dense_gradient(layers[row.module_name], adapted, batch).numpy()
        U, sigma, Vh = np.linalg.svd(numpy_update(layers[row.module_name]), full_matrices=False)
        U, Vh = U[:, : row.rank], Vh[: row.rank]
        norm = np.linalg.norm(G)
        assert row.gradient_norm == pytest.approx(norm, rel=0.03)
        assert row.kappa == pytest.approx(np.linalg.norm(U.T @ G @ Vh.T) / norm, rel=0.03)
        # this part does not depend on the projections
        assert gradients.overlaps[row.module_name].seen_norm == pytest.approx(np.linalg.norm(U.T @ G @ Vh.T), rel=1e-4)


@pytest.mark.slow
def test_the_estimate_is_unbiased_and_its_standard_error_holds(tiny_llama, randomize, batch):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    name, layer = next(iter(layers_of(model).items()))
    norm = float(dense_gradient(layer, model, batch).norm())
    misses = []
    for seed in range(40):
        with lens.watch_gradients(model, projections=8, seed=seed) as gradients:
            model(**batch).loss.backward()
        found = gradients.overlaps[name]
        squared_error = 2 * found.kappa_stderr / found.kappa * found.gradient_norm**2  # of ‖G‖², by the delta rule
        misses.append((found.gradient_norm**2 - norm**2) / squared_error)
    assert abs(np.mean(misses)) < 1.0
    assert 0.5 < np.std(misses) < 2.5


def test_micro_batches_add_up(adapted, batch):
    first, second = ({key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 3)))
    with lens.watch_gradients(adapted) as gradients:
        for part in (first, second):
            adapted(**part).loss.backward()
    with lens.watch_gradients(adapted) as together:
        (adapted(**first).loss + adapted(**second).loss).backward()
    assert gradients.overlaps.keys() == together.overlaps.keys()
    for name, one in gradients.overlaps.items():
        other = together.overlaps[name]
        assert (one.seen_norm, one.gradient_norm) == pytest.approx((other.seen_norm, other.gradient_norm), rel=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_layers_have_at_hand_is_what_would_be_computed(adapted, batch, autocast, monkeypatch):
    found = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(_Probe, "_is_plain", lambda *args: False)
        with lens.watch_gradients(adapted) as gradients, torch.autocast("cpu", enabled=autocast):
            adapted(**batch).loss.backward()
        adapted.zero_grad()
        found.append(gradients.overlaps)
    assert found[0].keys() == found[1].keys() != set()
    for name, one in found[0].items():
        other = found[1][name]
        close = pytest.approx if autocast is False else (lambda value: pytest.approx(value, rel=0.05, abs=1e-6))
        assert one.seen_norm == close(other.seen_norm)
        assert one.gradient_norm == close(other.gradient_norm)


def test_the_shortcut_is_taken_where_it_is_exact_and_nowhere_else(tiny_llama, randomize, batch, monkeypatch):
    taken = []
    is_plain = _Probe._is_plain
    monkeypatch.setattr(_Probe, "_is_plain", lambda *args: taken.append(is_plain(*args)) or taken[-1])
    for options, training, expected in (
        ({}, True, True),
        ({"lora_dropout": 0.5}, False, True),
        ({"lora_dropout": 0.5}, True, False),
        ({"use_dora": True}, True, False),
    ):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
        model = randomize(get_peft_model(tiny_llama(), config)).train(training)
        taken.clear()
        with lens.watch_gradients(model) as gradients:
            model(**batch).loss.backward()
        assert taken
        assert set(taken) == {expected}
        assert len(gradients.overlaps) == len(layers_of(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(adapted, batch, reentrant):
    adapted.train()
    with lens.watch_gradients(adapted) as plain:
        adapted(**batch).loss.backward()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    with lens.watch_gradients(adapted) as checkpointed:
        adapted(**batch).loss.backward()
    assert plain.overlaps.keys() == checkpointed.overlaps.keys()
    for name, one in plain.overlaps.items():
        assert checkpointed.overlaps[name].kappa == pytest.approx(one.kappa, rel=1e-4)


def test_wrapped_modules_keep_their_names(adapted, batch):
    """Wrapped by FSDP's activation checkpointing, or compiled one by one."""
    expected = [row.module_name for row in lens.snapshot(adapted).modules]
    layers = adapted.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1].self_attn.q_proj = torch.compile(layers[1].self_attn.q_proj, backend="eager")
    assert [row.module_name for row in lens.snapshot(adapted).modules] == expected


def test_offloaded_weights_are_watched_too(tiny_llama, randomize, batch):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    with lens.watch_gradients(model) as expected:
        model(**batch).loss.backward()
    cpu_offload(model, "cpu")
    model.enable_input_require_grads()
    with lens.watch_gradients(model) as found:
        model(**batch).loss.backward()
    assert {name: one.kappa for name, one in found.overlaps.items()} == pytest.approx(
        {name: one.kappa for name, one in expected.overlaps.items()}, rel=1e-4
    )


def test_kappa_does_not_depend_on_the_loss_scale(adapted, batch):
    found = []
    for scale in (1.0, 1024.0):
        with lens.watch_gradients(adapted) as gradients:
            (scale * adapted(**batch).loss).backward()
        found.append({name: one.kappa for name, one in gradients.overlaps.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision(tiny_llama, randomize, batch, how):
    exact = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    with lens.watch_gradients(exact, projections=64) as expected:
        exact(**batch).loss.backward()
    if how == "autocast":
        with lens.watch_gradients(exact, projections=64) as found, torch.autocast("cpu", torch.bfloat16):
            exact(**batch).loss.backward()
    else:
        half = exact.to(torch.bfloat16)
        with lens.watch_gradients(half, projections=64) as found:
            half(**batch).loss.backward()
    assert found.overlaps.keys() == expected.overlaps.keys()
    for name, one in expected.overlaps.items():
        assert found.overlaps[name].kappa == pytest.approx(one.kappa, rel=0.2), name


def test_watching_changes_neither_passes_nor_model(adapted, batch):
    def gradients():
        adapted.zero_grad()
        torch.manual_seed(5)
        adapted(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}, torch.rand(3)

    adapted.train()
    before, noise = gradients()
    with lens.watch_gradients(adapted):
        during, same_noise = gradients()
    assert torch.equal(noise, same_noise)
    assert before.keys() == during.keys()
    assert all(torch.equal(before[name], during[name]) for name in before)
    assert not any(module._forward_hooks for module in adapted.modules())


def test_hooks_are_removed_if_a_pass_fails(adapted):
    with pytest.raises(RuntimeError, match="stop"), lens.watch_gradients(adapted):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in adapted.modules())


def test_no_kappa_before_the_first_step_and_without_gradients(tiny_llama, batch):
    model = get_peft_model(tiny_llama(), CONFIGS["LORA"]())
    with lens.watch_gradients(model) as gradients:
        model(**batch).loss.backward()
    seen = lens.snapshot(model, gradients=gradients)
    assert all(row.kappa is None and row.gradient_norm > 0 for row in seen.modules)
    assert seen.total.kappa is None
    with lens.watch_gradients(model) as gradients, torch.no_grad():
        model(**batch)
    assert gradients.overlaps == {}


def test_no_kappa_with_a_scaling_of_zero(tiny_llama, randomize, batch):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    for layer in layers_of(model).values():
        layer.set_scale("default", 0.0)
    with lens.watch_gradients(model) as gradients:
        model(**batch).loss.backward()
    seen = lens.snapshot(model, gradients=gradients)
    assert all(row.kappa is None and row.gradient_norm > 0 and row.effective_rank == 0 for row in seen.modules)


def test_conv1d_of_gpt2(randomize):
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    model = randomize(get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)))
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    with lens.watch_gradients(model, projections=8192) as gradients:
        model(input_ids=ids, labels=ids).loss.backward()
    name, layer = next(iter(layers_of(model).items()))
    G = dense_gradient(layer, model, {"input_ids": ids, "labels": ids}).T.numpy()  # Conv1D's weight is (d_in, d_out)
    U, _, Vh = np.linalg.svd(numpy_update(layer), full_matrices=False)
    expected = np.linalg.norm(U[:, :2].T @ G @ Vh[:2].T) / np.linalg.norm(G)
    assert gradients.overlaps[name].kappa == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("projections", [1, 0, 2.0, True])
def test_invalid_projections(adapted, projections):
    with (
        pytest.raises(ValueError, match="`projections` must be an integer of at least 2"),
        lens.watch_gradients(adapted, projections=projections),
    ):
        pass


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_the_cpu(tiny_llama, randomize, batch):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    with lens.watch_gradients(model, projections=4096) as on_cpu:
        model(**batch).loss.backward()
    expected = lens.snapshot(model, gradients=on_cpu)
    model.to("cuda")
    with lens.watch_gradients(model, projections=4096) as gradients:
        model(**{key: value.cuda() for key, value in batch.items()}).loss.backward()
    for row, other in zip(lens.snapshot(model, gradients=gradients).modules, expected.modules, strict=True):
        assert row.effective_rank == pytest.approx(other.effective_rank, rel=1e-4)
        assert row.kappa == pytest.approx(other.kappa, rel=0.1)


# the report


@pytest.mark.slow
def test_kappa_by_chance_is_that_of_random_subspaces():
    """Against the mean over random factors: κ² averages r² / (d_out d_in)."""
    d_out, d_in, r = 12, 10, 3
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out, bias=False)), LoraConfig(r=r, target_modules=["0"]))
    layer = model.base_model.model[0]
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(20, d, generator=generator) for d in (d_in, d_out))
    squares, shares = [], []
    for _ in range(300):
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            nn.init.normal_(part.weight, generator=generator)
        with lens.watch_gradients(model, projections=2) as gradients:
            (model(x) * delta).sum().backward()
        squares.append(gradients.overlaps["0"].seen_norm ** 2 / float((delta.T @ x).square().sum()))
        shares.append(lens.snapshot(model, gradients=gradients).total.kappa_chance)
    assert shares == pytest.approx([r / math.sqrt(d_out * d_in)] * 300)
    assert np.mean(squares) == pytest.approx(shares[0] ** 2, abs=4 * np.std(squares) / math.sqrt(300))


def test_the_report(tiny_llama, randomize, batch):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    with lens.watch_gradients(model) as gradients:
        model(**batch).loss.backward()
    seen = lens.snapshot(model, step=3, gradients=gradients)
    assert seen.headline.startswith("step 3: CU 0.")
    assert seen.headline.endswith("over 14 modules")
    assert f"κ {seen.total.kappa:.3g} (chance {seen.total.kappa_chance:.3g})" in seen.headline
    assert seen.details[0] == f"Q–V gap {seen.qv_gap:+.3f}"
    assert seen.details[1].startswith("query (2): CU 0.")
    assert len(repr(seen).splitlines()) <= 10
    assert seen.to_frame()["module_name"].tolist() == [row.module_name for row in seen.modules]
    (axes,) = seen.plot().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [group.name for group in seen.roles]
    assert list(axes.lines[0].get_xdata()) == [0, 1]
    assert list(axes.lines[0].get_ydata()) == [row.capacity_utilization for row in seen.modules if row.role == "query"]


def test_a_report_without_finite_modules(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for layer in layers_of(model).values():
        nn.init.constant_(layer.lora_B["default"].weight, math.nan)
    seen = lens.snapshot(model)
    assert seen.headline == "not finite over 2 modules"
    assert len(seen.plot().axes[0].lines) == 1
