"""llama.cpp as a server of SmolLM2 with adapters, and PEFT on the same float32 weights.

`make test-servers` installs llama.cpp (node-llama-cpp, from npm) into build/servers.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from smollm2_float32 import save_transformers_base, write_gguf_base
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
    try:
        return write_gguf_base(BUILD / "smollm2-f32.gguf")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def base_directory(base_gguf: Path) -> Path:
    """The same weights as transformers saves them."""
    return save_transformers_base(BUILD / "smollm2-f32", base_gguf)


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
