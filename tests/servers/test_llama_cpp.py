"""llama.cpp computes what PEFT computes: with our GGUF files, and with what its own converter makes of our directories."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.compress import truncate
from lorakit.export import to_lora
from lorakit.merging import merge
from lorakit.serving import write_gguf

TOLERANCE = 5e-4  # the two engines differ by 1.4e-4 without an adapter
SHARED = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FISHER = FisherLoRAConfig(**SHARED, r_q=4)  # queries and values at other ranks than the rest
SPEC = SpecLoRAConfig(**SHARED, k=64)


def adapted(base, config, seed=0):
    """The model with an adapter of random values, as large as a trained one's."""
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = 0.1 if "lora_spec" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def save(base, config, directory, seed=0):
    adapted(base, config, seed).save_pretrained(directory)
    return directory


def lora(load_base, path):
    return save(load_base(), LoraConfig(**SHARED), path / "lora")


def rslora(load_base, path):
    return save(load_base(), LoraConfig(**SHARED | {"lora_alpha": 6}, use_rslora=True), path / "rslora")


def rslora_exported(load_base, path):
    to_lora(rslora(load_base, path), path / "out")
    return path / "out"


def fisherlora(load_base, path):
    return save(load_base(), FISHER, path / "fisherlora")


def fisherlora_exported(load_base, path):
    to_lora(adapted(load_base(), FISHER), path / "out")
    return path / "out"


def speclora_exact(load_base, path):
    to_lora(adapted(load_base(), SPEC), path / "out")
    return path / "out"


def speclora_cut(load_base, path):
    to_lora(adapted(load_base(), SPEC), path / "out", rank=16)
    return path / "out"


def compressed_by_energy(load_base, path):
    truncate(lora(load_base, path), path / "out", energy=0.9)
    return path / "out"


def merged(load_base, path):
    first = save(load_base(), FISHER, path / "first")
    second = save(load_base(), LoraConfig(**SHARED | {"r": 8, "lora_alpha": 8}), path / "second", seed=1)
    merge([first, second], path / "out", weights=[0.6, 0.4])
    return path / "out"


WRITTEN = (rslora_exported, fisherlora_exported, speclora_exact, speclora_cut, compressed_by_energy, merged)
EXPORTS = {export.__name__: export for export in (lora, rslora, fisherlora, *WRITTEN)}
CONVERTED = {f"{name}, converted": name for name in ("lora", *(export.__name__ for export in WRITTEN))}
# Its modules differ in rank, and PEFT saves them so: what the converter stores is wrong.
MIXED = {"fisherlora, converted": "fisherlora"}


def convert(directory, path):
    """What llama.cpp's convert_lora_to_gguf.py writes (llama-cpp-python 0.3.36): the config's lora_alpha, each tensor
    at its own rank, and rows of B in the order of LlamaModel.permute."""
    config = json.loads((directory / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        values = tensor.float().numpy()
        heads = {"q_proj": 9, "k_proj": 3}.get(module.rpartition(".")[2])
        if half == "B" and heads is not None:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names.get_name(module)}.weight.lora_{half.lower()}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def probabilities(model, tokens):
    return model(input_ids=tokens).logits[0].double().softmax(-1).numpy()


def with_doubled_alpha(path):
    reader = gguf.GGUFReader(path, "r+")
    alpha = reader.get_field("adapter.lora.alpha")
    alpha.parts[alpha.data[0]][0] *= 2
    reader.data.flush()


def with_query_rows_as_peft_has_them(path):
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_q.weight.lora_b"):
            rows = tensor.data.reshape(9, 32, 2, -1).swapaxes(1, 2).reshape(tensor.data.shape)
            tensor.data[:] = rows.copy()
    reader.data.flush()


CONTROLS = {control.__name__: control for control in (with_doubled_alpha, with_query_rows_as_peft_has_them)}


@pytest.fixture(scope="module")
def served(load_base, base_directory, llama_cpp, tokens, tmp_path_factory):
    """For each export, and each control, the probabilities of PEFT and of llama.cpp; and those of PEFT's base."""
    files, expected, directories = {}, {}, {}
    base = load_base()
    without = probabilities(base, tokens)
    for name, export in EXPORTS.items():
        path = tmp_path_factory.mktemp(name)
        directory = directories[name] = export(load_base, path)
        files[name] = path / "adapter.gguf"
        write_gguf(directory, files[name], base_config=base_directory)
        model = PeftModel.from_pretrained(base, directory).eval()
        expected[name] = probabilities(model, tokens)
        base = model.unload()
    for name, source in (CONVERTED | MIXED).items():
        files[name] = tmp_path_factory.mktemp("converted") / "adapter.gguf"
        convert(directories[source], files[name])
        expected[name] = expected[source]
    for name, spoil in CONTROLS.items():
        files[name] = tmp_path_factory.mktemp(name) / "adapter.gguf"
        shutil.copy(files["lora"], files[name])
        spoil(files[name])
        expected[name] = expected["lora"]
    return {name: (expected[name], p) for name, p in zip(files, llama_cpp(list(files.values())), strict=True)}, without


@pytest.mark.parametrize("name", [*EXPORTS, *CONVERTED])
def test_llama_cpp_agrees_with_peft(name, served):
    pairs, without = served
    expected, actual = pairs[name]
    assert np.abs(expected - without).max() > 0.05, "an adapter that changes nothing would agree with any file"
    assert np.abs(actual - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", ["fisherlora_exported", "speclora_exact"])
def test_an_exact_export_is_the_model_that_was_trained(name, served, load_base, tokens):
    model = adapted(load_base(), FISHER if name.startswith("fisher") else SPEC)
    assert np.abs(served[0][name][1] - probabilities(model, tokens)).max() < TOLERANCE


@pytest.mark.parametrize("name", [*CONTROLS, *MIXED])
def test_the_comparison_can_fail(name, served):
    expected, actual = served[0][name]
    assert np.abs(actual - expected).max() > 10 * TOLERANCE
