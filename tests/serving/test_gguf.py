"""GGUF adapters: names and row order as llama.cpp's conversion has them, one rank, one alpha; and what is refused."""

from __future__ import annotations

import json
import math
import sys

import gguf
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.errors import AdapterFileError, ExportError, LorakitError, MissingExtraError
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


def llama_adapter(path, ranks, *, heads=4, kv_heads=2, size=8, config=None, dtype=torch.float32, extra=None):
    """An adapter of a Llama's query and key projections on disk, and the dict of its base's config."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(extra or {})
    for name, rank, d_out in zip(("q_proj", "k_proj"), ranks, (heads * size, kv_heads * size), strict=True):
        key = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 24, generator=generator).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator).to(dtype)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    pattern = {"k_proj": ranks[1]} if ranks[1] != ranks[0] else {}
    values = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 6, "rank_pattern": pattern}
    (path / "adapter_config.json").write_text(json.dumps(values | (config or {})))
    base = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 24, "vocab_size": 64}
    return base | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_architecture_has_its_names_and_row_order(family, randomize, tmp_path):
    architecture, permutes, parts, _ = FAMILIES[family]
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **TASK)))
    model.save_pretrained(tmp_path / "adapter")

    report = write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=tmp_path / "base")

    fields, updates, _ = read(tmp_path / "out.gguf")
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
    kv_heads, groups, half, ranks, alpha, use_rslora, dtype, tmp_path_factory
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


def test_a_multimodal_model_has_its_text_part_adapted(tmp_path):
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


def test_the_base_that_the_adapter_names_is_found(tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 2), config={"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    by_name = write_gguf(tmp_path / "adapter", tmp_path / "a.gguf")
    by_file = write_gguf(tmp_path / "adapter", tmp_path / "b.gguf", base_config=tmp_path / "base" / "config.json")
    assert by_name.r == by_file.r == 4
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_invocation_tokens_of_alora_are_kept(tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), config={"alora_invocation_tokens": [5, 6, 7]})
    write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)
    assert read(tmp_path / "out.gguf")[0]["adapter.alora.invocation_tokens"] == [5, 6, 7]


# What is refused, by name


def saved(model, path):
    model.save_pretrained(path)
    return path


TRAINED = {
    "has a DoRA magnitude": LoraConfig(r=4, use_dora=True, **TASK),
    "has a `lora_bias`": LoraConfig(r=4, lora_bias=True, **TASK),
    "was made with `modules_to_save`": LoraConfig(r=4, modules_to_save=["norm"], **TASK),
    "was made with `trainable_token_indices`": LoraConfig(r=4, trainable_token_indices=[1, 2], **TASK),
    "whose mask is an update of the base weight": SpecLoRAConfig(r=4, k=8, **TASK),
    r"was made with init_lora_weights='pissa'": LoraConfig(r=4, init_lora_weights="pissa", **TASK),
}


@pytest.mark.parametrize("at_rest", [True, False])
@pytest.mark.parametrize("message", TRAINED)
def test_what_llama_cpp_cannot_load_is_refused(message, at_rest, tiny_llama, tmp_path):
    base = tiny_llama()
    config = base.config.to_dict()
    model = get_peft_model(base, TRAINED[message])
    with pytest.raises(ExportError, match=message):
        write_gguf(saved(model, tmp_path / "a") if at_rest else model, tmp_path / "out.gguf", base_config=config)
    assert not (tmp_path / "out.gguf").exists()


def test_trained_biases_are_refused(tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), config={"bias": "lora_only"})
    with pytest.raises(ExportError, match="was made with `bias`"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("model.embed_tokens.weight", 64, "embeddings saved whole"),
        ("model.embed_tokens.base_layer.weight", 65, "embeddings saved whole"),
        ("model.norm.weight", 24, "tensors that belong to no module: .*norm.weight"),
    ],
)
def test_tensors_beside_the_updates_are_refused(key, rows, message, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), extra={f"base_model.model.{key}": torch.zeros(rows, 24)})
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


def test_a_convolution_is_refused(tmp_path):
    key = "base_model.model.model.conv"
    extra = {f"{key}.lora_A.weight": torch.ones(4, 3, 2, 2), f"{key}.lora_B.weight": torch.ones(5, 4, 1, 1)}
    base = llama_adapter(tmp_path / "adapter", (4, 4), extra=extra)
    with pytest.raises(ExportError, match=r"'model\.conv' is a convolution"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_is_refused(target, tiny_llama, tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie"):
        model = get_peft_model(base, LoraConfig(r=4, target_modules=[target], **TASK))
    with pytest.raises(ExportError, match=f"{target}' is adapted, and the base model ties its embedding"):
        write_gguf(model, tmp_path / "out.gguf")


def test_a_tied_embedding_is_refused_where_the_config_leaves_it_to_the_default(tmp_path):
    key = "base_model.model.lm_head"
    extra = {f"{key}.lora_A.weight": torch.ones(4, 24), f"{key}.lora_B.weight": torch.ones(64, 4)}
    base = llama_adapter(tmp_path / "adapter", (4, 4), extra=extra)
    with pytest.raises(ExportError, match="ties its embedding"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base | {"model_type": "gemma2"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2'; GGUF can be written for Gemma2ForCausalLM, .*Qwen3ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=\['LlamaForSequenceClassification'\]"),
        ({"hidden_size": None}, "`hidden_size` in the base model's config must be a positive integer; got None"),
        ({"num_attention_heads": 8}, "'model.layers.0.self_attn.q_proj' has 32 rows, the config says 8 heads of 8"),
        ({"num_key_value_heads": 4}, "k_proj' has 16 rows, the config says 4 heads of 8"),
        ({"head_dim": 7, "num_key_value_heads": None}, "k_proj' has 16 rows, the config says heads of 7"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(changes, message, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4))
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base | changes)


def test_modules_without_a_tensor_are_refused(tmp_path):
    keys = {f"base_model.model.model.layers.{layer}.mlp.{part}": None for layer, part in [(0, "extra"), (7, "up_proj")]}
    extra = {f"{key}.lora_{half}.weight": torch.ones(4, 4) for key in keys for half in "AB"}
    base = llama_adapter(tmp_path / "adapter", (4, 4), extra=extra)
    message = r"2 of the adapter's modules have no tensor in llama.cpp's 'llama' models with 1 layers: 'model\.layers\.0\.mlp\.extra'"
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


def test_a_base_that_is_not_found_says_what_to_pass(tmp_path):
    llama_adapter(tmp_path / "adapter", (4, 4))
    with pytest.raises(ExportError, match="does not say what its base model is. Pass `base_config`"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf")
    with pytest.raises(ExportError, match=r"`base_config` must be a directory with a config.json, or that file; got "):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=tmp_path / "nowhere")
    llama_adapter(tmp_path / "adapter", (4, 4), config={"base_model_name_or_path": "no/such-model"})
    with pytest.raises(ExportError, match=r"base model 'no/such-model' was not found \(.*Pass `base_config`"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ExportError, match="must be a JSON object"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=tmp_path)


def test_bad_input(tmp_path, monkeypatch):
    base = llama_adapter(tmp_path / "adapter", (4, 4))
    with pytest.raises(ExportError, match="`out` must be a file"):
        write_gguf(tmp_path / "adapter", tmp_path, base_config=base)
    with pytest.raises(AdapterFileError):
        write_gguf(tmp_path / "nowhere" / "at" / "all", tmp_path / "out.gguf", base_config=base)
    (tmp_path / "adapter" / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ExportError, match="no adapter_config.json beside it"):
        write_gguf(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "out.gguf", base_config=base)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorakit\[gguf\]'"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_values_that_float32_cannot_hold_are_refused(value, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), config={"lora_alpha": 64})
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 1] = value
    save_file(tensors, weights)
    with pytest.raises(LorakitError, match="q_proj: lora_B has entries that float32 cannot hold"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


@pytest.mark.parametrize("spoiled", ["rows", "value", "alpha", "name"])
def test_what_reads_back_otherwise_is_not_kept(spoiled, tmp_path, monkeypatch):
    base = llama_adapter(tmp_path / "adapter", (4, 4))
    (tmp_path / "out.gguf").write_bytes(b"old")
    add_tensor, add_float32 = gguf.GGUFWriter.add_tensor, gguf.GGUFWriter.add_float32

    def wrong_tensor(writer, name, tensor):
        if name == "blk.0.attn_q.weight.lora_b":
            tensor = tensor.copy()
            if spoiled == "rows":  # as if they had not been permuted
                tensor = tensor.reshape(4, 4, 2, -1).swapaxes(1, 2).reshape(tensor.shape).copy()
            tensor[0, 0] *= 1.01 if spoiled == "value" else 1
            name = "blk.0.attn_v.weight.lora_b" if spoiled == "name" else name
        add_tensor(writer, name, tensor)

    def wrong_alpha(writer, key, value):
        add_float32(writer, key, value * (2 if spoiled == "alpha" else 1))

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong_tensor)
    monkeypatch.setattr(gguf.GGUFWriter, "add_float32", wrong_alpha)
    with pytest.raises(
        ExportError, match="has other tensors than were meant" if spoiled == "name" else "was read back"
    ):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]
