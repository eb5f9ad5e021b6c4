"""GGUF adapters: names and row order as llama.cpp's conversion has them, one rank, one alpha; and what is refused."""

from __future__ import annotations

import json
import math

import gguf
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorakit import FisherLoRAConfig
from lorakit.serving import write_gguf

TASK = {"task_type": "CAUSAL_LM"}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SEPARATE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# model type: general.architecture, whether query and key rows are permuted, tensors, changes to the config
FAMILIES = {
    "llama": ("llama", True, SEPARATE, {}),
    "llama-wide-heads": ("llama", True, SEPARATE, {"head_dim": 16}),
    "mistral": ("llama", True, SEPARATE, {}),
    "smollm3": ("smollm3", True, SEPARATE, {}),
    "qwen2": ("qwen2", False, SEPARATE, {}),
    "qwen3": ("qwen3", False, SEPARATE, {"head_dim": 16}),
    "gemma": ("gemma", False, SEPARATE, {"head_dim": 16}),
    "gemma2": ("gemma2", False, SEPARATE, {"head_dim": 16}),
    "gemma3_text": ("gemma3", False, SEPARATE, {"head_dim": 16}),
    "phi3": ("phi3", False, FUSED, {}),
}


def make_base(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = FAMILIES[family][3]
    config = AutoConfig.for_model(family.partition("-")[0], **SIZES | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def delta_weights(model):
    """By PEFT's own layers, in float64."""
    return {
        name: module.to(torch.float64).get_delta_weight("default").detach().numpy()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }


def in_conversion_order(update, heads):
    """The rows as llama.cpp's rotary embedding pairs them, one after the other, written out row by row."""
    size = len(update) // heads
    rows = [h * size + half * (size // 2) + pair for h in range(heads) for pair in range(size // 2) for half in (0, 1)]
    return update[rows]


def read(path):
    """The fields by name, and each update by its tensor's name: alpha over the tensor's own rank, as llama.cpp does."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    updates = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        updates[name] = fields["adapter.lora.alpha"] / B.shape[1] * B @ (A.T if name == "token_embd.weight" else A)
    return fields, updates, tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_each_architecture_has_its_names_and_row_order(family, randomize, tmp_path):
    architecture, permutes, parts, _ = FAMILIES[family]
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **TASK)))
    model.save_pretrained(tmp_path / "adapter")

    report = write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=tmp_path / "base")

    fields, updates, _ = read(tmp_path / "out.gguf")
    assert len(fields.pop("lorakit.sha256")) == 64
    assert fields == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    expected = {}
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2} if permutes else {}
    for name, update in delta_weights(model).items():
        layer, part = name.split(".")[2], ".".join(name.split(".")[3:])
        update = in_conversion_order(update, heads[part]) if part in heads else update
        expected[f"blk.{layer}.{parts[part]}.weight"] = update
    assert updates.keys() == expected.keys()
    assert len(updates) == 2 * len(parts)
    for name in expected:
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-6, err_msg=name)
    assert (report.architecture, report.r, report.lora_alpha) == (architecture, 4, 4.0)
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size
    assert report.error < 1e-6
    assert report.to_dict()["path"] == str(tmp_path / "out.gguf")


def test_a_row_order_means_the_same_rotary_embedding():
    """transformers rotates halves of a head, llama.cpp neighbours: on permuted rows these are one rotation."""
    size, angle = 8, np.linspace(0.1, 1.0, 4)
    q = np.random.default_rng(0).standard_normal((size, 1))
    first, second = q[: size // 2, 0], q[size // 2 :, 0]
    halves = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )
    even, odd = in_conversion_order(q, 1)[::2, 0], in_conversion_order(q, 1)[1::2, 0]
    neighbours = np.empty(size)
    neighbours[::2], neighbours[1::2] = (
        even * np.cos(angle) - odd * np.sin(angle),
        odd * np.cos(angle) + even * np.sin(angle),
    )
    np.testing.assert_allclose(in_conversion_order(halves[:, None], 1)[:, 0], neighbours)


@pytest.mark.slow
@hypothesis.given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 5),
    ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    alpha=st.sampled_from([0, 1e-10, 1, 8.75, 64]),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_updates_of_any_ranks_and_scalings_survive(
    llama_adapter, kv_heads, groups, half, ranks, alpha, use_rslora, dtype, tmp_path_factory
):
    path = tmp_path_factory.mktemp("any")
    heads, size = kv_heads * groups, 2 * half
    base = llama_adapter(
        path / "adapter",
        ranks,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        config={"lora_alpha": alpha, "use_rslora": use_rslora},
        dtype=dtype,
    )
    report = write_gguf(path / "adapter", path / "out.gguf", base_config=base)
    fields, updates, tensors = read(path / "out.gguf")
    assert {tensor.shape[0 if name.endswith("a") else 1] for name, tensor in tensors.items()} == {max(ranks)}
    assert report.parameters == sum(tensor.size for tensor in tensors.values())
    stored = load_file(path / "adapter" / "adapter_model.safetensors")
    for part, rank, n_heads in zip("qk", ranks, (heads, kv_heads), strict=True):
        key = f"base_model.model.model.layers.0.self_attn.{part}_proj"
        A, B = (stored[f"{key}.lora_{half}.weight"].double().numpy() for half in "AB")
        scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        expected = in_conversion_order(scaling * B @ A, n_heads)
        np.testing.assert_allclose(
            updates[f"blk.0.attn_{part}.weight"], expected, atol=1e-6 * scaling * rank * 10, rtol=1e-6
        )


def test_fisherlora_is_written_at_one_rank(tiny_llama, randomize, tmp_path):
    model = randomize(get_peft_model(tiny_llama(), FisherLoRAConfig(r=6, r_q=2, target_modules="all-linear", **TASK)))
    write_gguf(model, tmp_path / "out.gguf")  # the model has its config
    fields, updates, tensors = read(tmp_path / "out.gguf")
    assert fields["adapter.lora.alpha"] == 6
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (6, 32)
    assert not tensors["blk.0.attn_q.weight.lora_a"][2:].any()
    expected = delta_weights(model)
    q = in_conversion_order(expected["model.layers.0.self_attn.q_proj"], 4)
    np.testing.assert_allclose(updates["blk.0.attn_q.weight"], q, atol=1e-6)
    np.testing.assert_allclose(updates["blk.0.ffn_down.weight"], expected["model.layers.0.mlp.down_proj"], atol=1e-6)


def test_an_untied_embedding_and_head(tiny_llama, randomize, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head"], **TASK)
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(base, config))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".embed_tokens.base_layer." in key for key in tensors), "PEFT saves a copy of the base weight"
    write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=tmp_path / "base")
    _, updates, written = read(tmp_path / "out.gguf")
    assert written["token_embd.weight.lora_a"].shape == (64, 4)
    expected = delta_weights(model)
    np.testing.assert_allclose(updates["token_embd.weight"].T, expected["model.embed_tokens"], atol=1e-6)
    np.testing.assert_allclose(updates["output.weight"], expected["lm_head"], atol=1e-6)


def test_a_multimodal_model_has_its_text_part_adapted(llama_adapter, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4))
    text = {**base, "model_type": "gemma3_text"}
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k.replace("model.layers", "model.language_model.layers"): t for k, t in tensors.items()}, weights)
    write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=nested)
    fields, updates, _ = read(tmp_path / "out.gguf")
    assert fields["general.architecture"] == "gemma3"
    assert updates.keys() == {"blk.0.attn_q.weight", "blk.0.attn_k.weight"}


def test_the_base_that_the_adapter_names_is_found(llama_adapter, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 2), config={"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    by_name = write_gguf(tmp_path / "adapter", tmp_path / "a.gguf")
    by_file = write_gguf(tmp_path / "adapter", tmp_path / "b.gguf", base_config=tmp_path / "base" / "config.json")
    assert by_name.r == by_file.r == 4
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_invocation_tokens_of_alora_are_kept(llama_adapter, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), config={"alora_invocation_tokens": [5, 6, 7]})
    write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)
    assert read(tmp_path / "out.gguf")[0]["adapter.alora.invocation_tokens"] == [5, 6, 7]
