"""SpecLoRA against the paper's formula written out, with Γ formed in full."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from closeness import assert_close_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import ArrowConfig
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lorakit import SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.errors import AdapterFileError
from lorakit.tuners.speclora import MODES, SpecLoRALinear

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SHAPES = [(24, 40), (40, 24), (32, 32)]


class OneLayer(nn.Module):
    def __init__(self, d_out: int, d_in: int, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = nn.Linear(d_in, d_out, dtype=dtype) if kind == "Linear" else Conv1D(d_out, d_in).to(dtype)
        nn.init.normal_(self.lin.weight)
        nn.init.normal_(self.lin.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)

    @property
    def W(self) -> torch.Tensor:
        """The weight as d_out × d_in."""
        base = self.lin.base_layer if hasattr(self.lin, "base_layer") else self.lin
        return base.weight.T if isinstance(base, Conv1D) else base.weight


def adapted(d_out=24, d_in=40, kind="Linear", dtype=torch.float64, mode="hadamard", k=7, r=3, seed=0, **options):
    torch.manual_seed(seed)
    base = OneLayer(d_out, d_in, kind, dtype)
    config = SpecLoRAConfig(r=r, lora_alpha=2 * r, k=k, mode=mode, target_modules=["lin"], **options)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model.lin
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model, layer


def gamma(d: torch.Tensor, d_out: int, d_in: int, mode: str) -> torch.Tensor:
    """Eq. 8: ones, but for a block whose every column is d."""
    k = d.shape[0]
    columns = d[:, None].expand(k, k)
    full = torch.ones(d_out, d_in, dtype=d.dtype)
    rows, cols = (slice(0, k), slice(0, k)) if mode == "hadamard" else (slice(d_out - k, None), slice(d_in - k, None))
    return full.index_put(
        tuple(torch.meshgrid(torch.arange(d_out)[rows], torch.arange(d_in)[cols], indexing="ij")), columns
    )


def literal_weight(W: torch.Tensor, d: torch.Tensor, mode: str) -> torch.Tensor:
    """W' without the low-rank term, as the paper writes it: Eq. 7-8, or Eq. 3-6 with a full SVD."""
    d_out, d_in = W.shape
    k = d.shape[0]
    if mode.startswith("hadamard"):
        return gamma(d, d_out, d_in, mode) * W
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    n = S.shape[0]
    chosen = slice(0, k) if mode == "svd" else slice(n - k, n)
    D = torch.diag(d)
    columns = torch.cat([D @ U[:k, chosen], U[k:, chosen]])
    U_tilde = torch.cat([U[:, : chosen.start], columns, U[:, chosen.stop :]], dim=1)
    return U_tilde @ torch.diag(S) @ Vh


def literal_forward(model, layer, x):
    base = model.base_model.model
    d = 1 + layer.lora_spec["default"].weight
    W = literal_weight(base.W, d, layer.lora_spec["default"].mode)
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return x @ W.T + base.lin.bias + layer.scaling["default"] * (x @ A.T) @ B.T


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm().clamp(min=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_gradients_and_merged_weight_are_those_of_the_formula(shape, mode, kind, dtype):
    model, layer = adapted(*shape, kind=kind, dtype=dtype, mode=mode)
    tolerance = TOLERANCE[dtype]
    x = torch.randn(2, 5, shape[1], dtype=dtype, requires_grad=True)
    wanted = {
        "x": x,
        "d": layer.lora_spec["default"].weight,
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
    }
    expected, actual = literal_forward(model, layer, x), model(x)
    assert close(actual, expected, tolerance)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, wanted.values(), upstream)
    actual_grads = torch.autograd.grad(actual, wanted.values(), upstream)
    for name, a, b in zip(wanted, actual_grads, expected_grads, strict=True):
        assert close(a, b, tolerance), name

    d = 1 + layer.lora_spec["default"].weight.detach()
    low_rank = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected_weight = literal_weight(model.base_model.model.W, d, mode) + low_rank
    model.merge_adapter()
    assert close(model.base_model.model.W, expected_weight, tolerance)
    assert close(model(x), expected, tolerance)


def test_a_new_adapter_changes_nothing():
    torch.manual_seed(0)
    base = OneLayer(24, 40, "Linear", torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64)
    expected = base(x)
    for mode in MODES:
        model = get_peft_model(copy.deepcopy(base), SpecLoRAConfig(k=5, mode=mode, target_modules=["lin"]))
        assert_close_outputs(model(x), expected)


@pytest.mark.slow
@given(k=st.integers(1, 60), d_out=st.integers(1, 30), d_in=st.integers(1, 30), mode=st.sampled_from(MODES))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:SpecLoRA. `k` is clipped")
def test_any_k_is_clipped_to_the_smaller_side(k, d_out, d_in, mode):
    model, layer = adapted(d_out, d_in, k=k, mode=mode, r=1)
    assert layer.lora_spec["default"].k == min(k, d_out, d_in)
    x = torch.randn(4, d_in, dtype=torch.float64)
    assert close(model(x), literal_forward(model, layer, x), 1e-9)


def test_clipping_is_reported_once(tiny_llama):
    with pytest.warns(UserWarning, match="SpecLoRA: `k` is clipped .* in 10 of 14 modules") as caught:
        model = get_peft_model(
            tiny_llama(), SpecLoRAConfig(k=40, target_modules="all-linear", k_pattern={"q_proj": 8, "o_proj": 4})
        )
    assert len([w for w in caught if "clipped" in str(w.message)]) == 1
    layer = model.base_model.model.model.layers[0]
    sizes = {
        name: module.lora_spec["default"].k
        for name, module in layer.named_modules()
        if isinstance(module, SpecLoRALinear)
    }
    assert (sizes["self_attn.q_proj"], sizes["self_attn.o_proj"]) == (8, 4)
    assert sizes["self_attn.k_proj"] == 16
    assert sizes["mlp.up_proj"] == 32


def test_k_pattern_follows_the_rules_of_rank_pattern(tiny_llama):
    config = SpecLoRAConfig(
        k=3, target_modules=["q_proj", "v_proj"], k_pattern={r"layers\.1\..*q_proj": 5, "v_proj": 2, "nowhere": 9}
    )
    with pytest.warns(RuntimeWarning, match="k_pattern keys did not match .*nowhere"):
        model = get_peft_model(tiny_llama(), config)
    found = {name: m.lora_spec["default"].k for name, m in model.named_modules() if isinstance(m, SpecLoRALinear)}
    assert [
        found[f"base_model.model.model.layers.{i}.self_attn.{n}"] for i in (0, 1) for n in ("q_proj", "v_proj")
    ] == [3, 2, 5, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_unmerging_restores_the_weight_even_where_d_is_zero(kind, mode, dtype):
    model, layer = adapted(kind=kind, mode=mode, dtype=dtype)
    with torch.no_grad():
        layer.lora_spec["default"].weight[:3] = torch.tensor([-1.0, -1.0 + 1e-7, 1e6], dtype=dtype)  # d = 0, tiny, huge
        layer.lora_spec["default"].weight[2] = 3.0
    before = layer.base_layer.weight.detach().clone()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert not torch.equal(layer.base_layer.weight, before)
        if mode == "hadamard":
            merged = model.base_model.model.W[0, : layer.lora_spec["default"].k]
            low_rank = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)[0, :7] * layer.scaling[
                "default"
            ]
            assert torch.allclose(
                merged.double(), low_rank.double(), atol=10 * torch.finfo(dtype).eps
            )  # d = 0: W is gone
        model.unmerge_adapter()
        assert torch.allclose(layer.base_layer.weight, before, rtol=0, atol=16 * torch.finfo(dtype).eps)
        assert layer.lora_spec["default"].block is None or mode.startswith("svd")


def test_two_merged_adapters_each_rescale_the_base_weight_alone():
    model, layer = adapted()
    model.add_adapter("second", SpecLoRAConfig(r=2, k=5, target_modules=["lin"]))
    for parameter in layer.lora_spec["second"].parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(layer.lora_B["second"].weight)
    W = model.base_model.model.W.detach().clone()
    deltas = {name: layer.get_delta_weight(name).detach().clone() for name in ("default", "second")}
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert torch.allclose(model.base_model.model.W, W + deltas["default"] + deltas["second"], rtol=1e-12)
    model.unmerge_adapter()
    assert torch.allclose(model.base_model.model.W, W, atol=1e-13, rtol=0)
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="SpecLoRA does not support adding an adapter to 'lin' while"):
        model.add_adapter("third", SpecLoRAConfig(k=2, target_modules=["lin"]))
    assert "third" not in model.peft_config
    model.unmerge_adapter()
    assert torch.allclose(model.base_model.model.W, W, atol=1e-13, rtol=0)


def test_a_merge_that_fails_leaves_nothing_behind():
    model, layer = adapted()
    with torch.no_grad():
        layer.lora_spec["default"].weight[0] = float("nan")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    assert layer.lora_spec["default"].block is None


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_and_functional_gradients(mode):
    """Where training's own way of adding gradients up is not taken, or is itself differentiated."""
    model, layer = adapted(6, 8, mode=mode, k=3, r=2)
    names = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).pow(3).sum()

    expected = literal_forward(model, layer, x).pow(3).sum()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(model(x).pow(3).sum(), leaves, create_graph=True)
    wanted = torch.autograd.grad(expected, leaves, create_graph=True)
    second, wanted_second = (torch.autograd.grad(sum(g.square().sum() for g in f), leaves) for f in (first, wanted))
    for a, b in zip([*first, *second], [*wanted, *wanted_second], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    of_parameters, of_x = torch.func.grad(loss, argnums=(0, 1))(names, x.detach())
    torch.testing.assert_close(of_x, wanted[0].detach(), rtol=1e-9, atol=1e-9)
    for (name, gradient), b in zip(of_parameters.items(), wanted[1:], strict=True):
        torch.testing.assert_close(gradient, b.detach(), rtol=1e-9, atol=1e-9, msg=name)


def test_gradients_that_hooks_have_seen_stay_as_they_were():
    model, layer = adapted(6, 8, k=3, r=2)
    seen, kept = [], []

    def look(module, inputs, outputs):
        for gradient in (*inputs, *outputs):
            if gradient is not None:
                seen.append(gradient)
                kept.append(gradient.clone())

    handles = [m.register_full_backward_hook(look) for m in (layer.base_layer, layer.lora_A["default"], layer)]
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, kept, strict=True))
    for handle in handles:
        handle.remove()
    expected = torch.autograd.grad(literal_forward(model, layer, x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-9)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_memory(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in given:  # no view of an input
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_forms_neither_mask_nor_anything_of_its_size(mode):
    d, k, tokens = 96, 16, 4
    model, layer = adapted(d, d, dtype=torch.float32, mode=mode, k=k, r=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(tokens, d, requires_grad=True)
    with LargestTensor() as watch:
        F.mse_loss(model(x), torch.ones(tokens, d)).backward()
        optimizer.step()
    assert 0 < watch.largest <= max(tokens * d, 2 * d, k * k), watch.largest
    with LargestTensor() as watch:
        literal_forward(model, layer, x).sum().backward()
    assert watch.largest >= d * d  # the watch sees what it is for


def test_saved_activations_are_lora_s_plus_tokens_times_k():
    def saved(config):
        torch.manual_seed(0)
        model = get_peft_model(OneLayer(96, 96, "Linear", torch.float32), config)
        x, sizes = torch.randn(50, 96), {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = max(sizes.get(tensor.data_ptr(), 0), tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x)
        parameters = {p.data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    lora = saved(LoraConfig(r=2, target_modules=["lin"]))
    spec = saved(SpecLoRAConfig(r=2, k=16, target_modules=["lin"]))
    assert spec <= lora + 50 * 16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_and_loading_give_the_same_bits(tiny_llama, randomize, token_ids, tmp_path, mode, dtype):
    config = SpecLoRAConfig(r=2, k=12, mode=mode, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = randomize(get_peft_model(tiny_llama(dtype), config)).eval()
    expected = model(input_ids=token_ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(dtype), tmp_path).eval()
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert_close_outputs(loaded(input_ids=token_ids).logits, expected)
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "adapter_model.safetensors")
    masks = [key for key in keys if "lora_spec" in key]
    assert len(masks) == 4
    assert all(keys[key].shape == (12,) for key in masks)  # d alone: no block of the base weight
    assert all(key.endswith(f"lora_spec.weight_{mode}") for key in masks)


@pytest.mark.parametrize("saved", MODES)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_loads_only_into_its_own_mode(mode, saved):
    model, source = adapted(mode=mode)[0], adapted(mode=saved, seed=1)[0]
    tensors = get_peft_model_state_dict(source)
    if mode == saved:
        loaded = set_peft_model_state_dict(model, tensors)
        assert not loaded.unexpected_keys
        weights = (m.base_model.model.lin.lora_spec["default"].weight for m in (model, source))
        assert torch.equal(*weights)
        return
    with pytest.raises(AdapterFileError, match=rf"lora_spec.weight_{saved}', but the adapter's `mode` is '{mode}'"):
        set_peft_model_state_dict(model, tensors)
    raw = {name: value for name, value in source.state_dict().items() if "lora_" in name}
    with pytest.raises(RuntimeError, match=rf"lora_spec.default.weight_{saved}', but the adapter's `mode` is '{mode}'"):
        model.load_state_dict(raw, strict=False)


def test_a_checkpoint_does_not_load_if_its_config_was_edited_to_another_mode(tmp_path):
    adapted()[0].save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"hadamard"', '"svd"'))
    assert [finding.code for finding in open_adapter(tmp_path).findings] == ["mode_mismatch"]
    with pytest.raises(AdapterFileError, match="Make the adapter with the `mode` that the checkpoint was trained with"):
        PeftModel.from_pretrained(OneLayer(24, 40, "Linear", torch.float64), tmp_path)


@pytest.mark.slow
def test_low_cpu_memory_loading(tiny_llama, randomize, token_ids, tmp_path):
    for mode in MODES:
        config = SpecLoRAConfig(r=2, k=12, mode=mode, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = randomize(get_peft_model(tiny_llama(), config)).eval()
        model.save_pretrained(tmp_path / mode)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / mode, low_cpu_mem_usage=True).eval()
        assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


def test_pickle_and_deepcopy(randomize, tiny_llama, token_ids):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(k=8, mode="svd", target_modules=["v_proj"]))).eval()
    expected = model(input_ids=token_ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close_outputs(other(input_ids=token_ids).logits, expected)


@pytest.mark.slow
def test_a_bare_layer_is_unpickled_where_nothing_has_been_imported(run_python, tmp_path):
    _, layer = adapted()
    (tmp_path / "layer.pkl").write_bytes(pickle.dumps(layer))
    run_python(f"""
        import pickle
        layer = pickle.loads(open({str(tmp_path / "layer.pkl")!r}, "rb").read())
        assert type(layer).__name__ == "SpecLoRALinear"
        from peft import PeftType
        assert "SPECLORA" in PeftType.__members__
    """)


def test_only_the_adapter_trains_and_disabling_gives_the_base(tiny_llama, randomize, token_ids):
    base = tiny_llama()(input_ids=token_ids).logits
    model = randomize(
        get_peft_model(tiny_llama(), SpecLoRAConfig(k=8, r=2, target_modules=["q_proj", "v_proj"]))
    ).eval()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert sum("lora_spec" in name for name in trainable) == 4
    assert not torch.allclose(model(input_ids=token_ids).logits, base)
    with model.disable_adapter():
        assert_close_outputs(model(input_ids=token_ids).logits, base)
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * (32 + 32) + 8 + 2 * (32 + 16) + 8)
    assert_close_outputs(model.unload()(input_ids=token_ids).logits, base)


def test_several_adapters_and_mixed_batches(tiny_llama, randomize, token_ids):
    model = get_peft_model(tiny_llama(), SpecLoRAConfig(k=8, r=2, target_modules=["q_proj"]))
    model.add_adapter("b", SpecLoRAConfig(k=4, r=3, mode="hadamard_bottom", target_modules=["q_proj", "v_proj"]))
    for name in ("default", "b"):
        model.set_adapter(name)
        randomize(model, seed=len(name))
    model.eval()
    alone = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = model(input_ids=token_ids).logits
    with model.disable_adapter():
        alone["__base__"] = model(input_ids=token_ids).logits
    for names in (["default", "b"], ["b", "__base__"], ["default", "default"]):
        mixed = model(input_ids=token_ids, adapter_names=names).logits
        for row, name in enumerate(names):
            assert torch.allclose(mixed[row], alone[name][row], atol=1e-5)
    model.delete_adapter("b")
    model.set_adapter("default")
    assert_close_outputs(model(input_ids=token_ids).logits, alone["default"])
    assert not any("b" in m.lora_spec for m in model.modules() if isinstance(m, SpecLoRALinear))


def test_the_mask_follows_the_scale():
    model, layer = adapted()
    x = torch.randn(3, 40, dtype=torch.float64)
    full = model(x)
    with model.disable_adapter():
        base = model(x)
    layer.set_scale("default", 0)
    assert torch.allclose(model(x), base)
    layer.set_scale("default", 0.5)
    assert torch.allclose(model(x), (full + base) / 2)
    assert torch.allclose(layer.get_delta_weight("default") @ x[0], (full - base)[0] / 2)
    layer.unscale_layer()
    assert torch.allclose(model(x), full)


def test_bfloat16_computes_in_bfloat16_and_autocast_works():
    model, layer = adapted(dtype=torch.bfloat16)
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    model32, layer32 = adapted(dtype=torch.float32)
    x32 = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = model32(x32)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), literal_forward(model32, layer32, x32), rtol=0.05, atol=0.2)


def test_meta_tensors_propagate():
    model = get_peft_model(OneLayer(24, 40, "Linear", torch.bfloat16), SpecLoRAConfig(k=4, target_modules=["lin"]))
    model.to("meta")
    out = model(torch.empty(3, 40, dtype=torch.bfloat16, device="meta"))
    assert (out.device.type, out.dtype, tuple(out.shape)) == ("meta", torch.bfloat16, (3, 24))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu():
    model, layer = adapted(dtype=torch.float32)
    x = torch.randn(3, 40)
    expected = model(x)
    assert torch.allclose(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_an_offloaded_model_computes_merges_and_unmerges(tiny_llama, randomize, token_ids, mode):
    from accelerate import cpu_offload

    config = SpecLoRAConfig(r=2, k=8, mode=mode, target_modules=["q_proj", "down_proj"])
    model = randomize(get_peft_model(tiny_llama(), config)).eval()
    expected = model(input_ids=token_ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(m for m in model.modules() if isinstance(m, SpecLoRALinear)).lora_spec["default"].weight.is_meta
    assert_close_outputs(model(input_ids=token_ids).logits, expected)
    model.merge_adapter()
    assert torch.allclose(model(input_ids=token_ids).logits, expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(input_ids=token_ids).logits, expected, atol=1e-5)


def test_a_hotswap_that_would_scale_the_mask_wrongly_is_refused(tiny_llama, randomize, token_ids, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    logits = {}
    for name, alpha, seed in (("a", 4, 1), ("b", 4, 2), ("c", 8, 3)):
        config = SpecLoRAConfig(r=2, lora_alpha=alpha, k=8, target_modules=["q_proj"])
        model = randomize(get_peft_model(tiny_llama(), config), seed=seed).eval()
        logits[name] = model(input_ids=token_ids).logits
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    hotswap_adapter(model, tmp_path / "b", "default")
    assert_close_outputs(model(input_ids=token_ids).logits, logits["b"])
    with pytest.raises(ValueError, match="lora_alpha"):
        hotswap_adapter(model, tmp_path / "c", "default")
    assert_close_outputs(model(input_ids=token_ids).logits, logits["b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be a positive integer; got 0"),
        ({"k": True}, "`k` must be a positive integer; got True"),
        ({"k_pattern": {"q": -1}}, r"`k_pattern\['q'\]` must be a positive integer; got -1"),
        ({"mode": "top"}, "`mode` must be one of hadamard, hadamard_bottom, svd, svd_bottom; got 'top'"),
        ({"use_qalora": True}, "^SpecLoRA does not support `use_qalora`"),
        ({"arrow_config": ArrowConfig()}, "^SpecLoRA does not support `arrow_config`"),
        ({"megatron_config": {"a": 1}, "megatron_core": "x"}, "^SpecLoRA does not support `megatron_config`"),
        ({"k": 0, "mode": "x"}, "^SpecLoRA: `k` must .* `mode` must"),
    ],
)
def test_bad_configs_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        SpecLoRAConfig(**options)


def test_the_config_is_kept_as_peft_keeps_it(tiny_llama, tmp_path):
    for targets in (None, ["q_proj", "v_proj"]):
        config = SpecLoRAConfig(k=4, target_modules=targets)
        model = get_peft_model(tiny_llama(), config)
        assert model.peft_config["default"] is config
        assert config.target_modules == {"q_proj", "v_proj"}
    model.save_pretrained(tmp_path)
    config = SpecLoRAConfig(k=4)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
