"""What cannot be a GGUF adapter is refused by name, and what reads back otherwise than it was meant is not kept."""

from __future__ import annotations

import math
import sys

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorakit import SpecLoRAConfig
from lorakit.errors import AdapterFileError, ExportError, LorakitError, MissingExtraError
from lorakit.serving import write_gguf

TASK = {"task_type": "CAUSAL_LM"}


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


def test_trained_biases_are_refused(llama_adapter, tmp_path):
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
def test_tensors_beside_the_updates_are_refused(llama_adapter, key, rows, message, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), extra={f"base_model.model.{key}": torch.zeros(rows, 24)})
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


def test_a_convolution_is_refused(llama_adapter, tmp_path):
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


def test_a_tied_embedding_is_refused_where_the_config_leaves_it_to_the_default(llama_adapter, tmp_path):
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
def test_a_base_that_does_not_fit_is_refused(llama_adapter, changes, message, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4))
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base | changes)


def test_modules_without_a_tensor_are_refused(llama_adapter, tmp_path):
    keys = {f"base_model.model.model.layers.{layer}.mlp.{part}": None for layer, part in [(0, "extra"), (7, "up_proj")]}
    extra = {f"{key}.lora_{half}.weight": torch.ones(4, 4) for key in keys for half in "AB"}
    base = llama_adapter(tmp_path / "adapter", (4, 4), extra=extra)
    message = r"2 of the adapter's modules have no tensor in llama.cpp's 'llama' models with 1 layers: 'model\.layers\.0\.mlp\.extra'"
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


def test_a_base_that_is_not_found_says_what_to_pass(llama_adapter, tmp_path):
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


def test_bad_input(llama_adapter, tmp_path, monkeypatch):
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
def test_values_that_float32_cannot_hold_are_refused(llama_adapter, value, tmp_path):
    base = llama_adapter(tmp_path / "adapter", (4, 4), config={"lora_alpha": 64})
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 1] = value
    save_file(tensors, weights)
    with pytest.raises(LorakitError, match="q_proj: lora_B has entries that float32 cannot hold"):
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base)


@pytest.mark.parametrize("spoiled", ["rows", "value", "alpha", "name"])
def test_what_reads_back_otherwise_is_not_kept(llama_adapter, spoiled, tmp_path, monkeypatch):
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
        write_gguf(tmp_path / "adapter", tmp_path / "out.gguf", base_config=base, overwrite=True)
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]
