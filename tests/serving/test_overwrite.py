"""The writers of other formats replace what they wrote, and nothing else unasked."""

from __future__ import annotations

import functools

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit import serving
from lorakit.adapters import open_adapter
from lorakit.errors import OverwriteError
from lorakit.export import to_lora

WRITERS = ["gguf", "mlx", "diffusers", "kohya"]


@pytest.fixture
def adapter(llama_adapter, tmp_path):
    llama_adapter(tmp_path / "adapter", (4, 2))
    return tmp_path / "adapter"


@pytest.fixture
def writer(llama_adapter, tmp_path):
    """The writer of a format, what it is given as `out`, and the file in which its tensors then are."""
    base = llama_adapter(tmp_path / "for its base", (4, 2))

    def make(name):
        write = getattr(serving, f"write_{name}")
        if name == "gguf":
            write = functools.partial(write, base_config=base)
        out = tmp_path / "out"
        return write, out, out / "adapters.safetensors" if name == "mlx" else out

    return make


def change_an_entry(path):
    """As another program would that keeps the header."""
    if path.read_bytes()[:4] == b"GGUF":
        reader = gguf.GGUFReader(path, "r+")
        reader.tensors[0].data[0, 0] += 1
        reader.data.flush()
        return
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.ndim)[0, 0] += 1
    save_file(tensors, path, metadata=metadata)


def rewrite_without_metadata(path):
    if path.read_bytes()[:4] == b"GGUF":
        data = path.read_bytes()
        path.write_bytes(data.replace(b"lorakit.sha256", b"another.sha256"))
    else:
        save_file(load_file(path), path)


FOREIGN = {
    "other bytes": lambda path: path.write_bytes(b"anything"),
    "an empty file": lambda path: path.write_bytes(b""),
    "half of the file": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "another entry": change_an_entry,
    "no metadata": rewrite_without_metadata,
}


@pytest.mark.parametrize("name", WRITERS)
def test_its_own_file_is_replaced_also_by_another_adapter_s(name, adapter, writer, llama_adapter, tmp_path):
    write, out, file = writer(name)
    write(adapter, out)
    first = file.read_bytes()
    write(adapter, out)
    assert len(file.read_bytes()) == len(first)
    llama_adapter(tmp_path / "other", (3, 3))
    write(tmp_path / "other", out)
    assert file.read_bytes() != first


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("name", WRITERS)
def test_another_file_is_replaced_only_when_asked(name, foreign, adapter, writer):
    write, out, file = writer(name)
    write(adapter, out)
    FOREIGN[foreign](file)
    before = file.read_bytes()
    with pytest.raises(OverwriteError, match=r"`out` '.*' (is|has) .* lorakit did not write.* Pass `overwrite=True`"):
        write(adapter, out)
    assert file.read_bytes() == before
    write(adapter, out, overwrite=True)
    write(adapter, out)


def test_mlx_does_not_replace_the_config_of_a_peft_adapter(adapter, tmp_path):
    to_lora(adapter, tmp_path / "peft")
    config = (tmp_path / "peft" / "adapter_config.json").read_bytes()
    with pytest.raises(OverwriteError, match=r"has an adapter_config.json that lorakit did not write for mlx-lm"):
        serving.write_mlx(adapter, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").read_bytes() == config


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_the_adapter_s_own_file_is_not_replaced(name, adapter):
    weights = adapter / "adapter_model.safetensors"
    with pytest.raises(OverwriteError, match="lorakit did not write"):
        getattr(serving, f"write_{name}")(adapter, weights)
    assert all(
        torch.isfinite(open_adapter(adapter).factors(module).A).all() for module in open_adapter(adapter).modules
    )
