"""Tiny models, and examples for them."""

from __future__ import annotations

import json
import os

from safetensors.torch import save_file
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from torch import Tensor, nn

# Where a failure stops others, the examples are always the same; elsewhere new ones are tried each time.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unable to fetch remote file")
        warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
        yield


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Makes a two-layer Llama with grouped-query attention, always with the same weights."""

    def make(dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype).eval()

    return make


@pytest.fixture
def tiny_gpt2() -> Callable[..., nn.Module]:
    """Makes a two-layer GPT-2: Conv1D layers, fused query, key and value."""

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
            return GPT2LMHeadModel(config).to(dtype).eval()

    return make


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Gives every trainable parameter random values, as training would."""

    def fill(model: nn.Module, std: float = 0.1, seed: int = 2) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
                    parameter.copy_(values)
        return model

    return fill


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh interpreter and returns what it did; fails the test where that fails, unless told not to."""

    def run(code: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
            timeout=300,
        )
        if check and done.returncode != 0:
            pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture
def base_model(tmp_path, tiny_llama):
    """A tiny Llama on disk, with a tokenizer of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", *(f"w{i}" for i in range(62))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    path = tmp_path / "base"
    tiny_llama().save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)
    return path


@pytest.fixture
def write_adapter(tmp_path):
    """Writes an adapter of the given (B, A) by module name, as PEFT would, and returns its directory."""

    def write(name, factors, **config):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        tensors = {}
        for module, (B, A) in factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{module}.lora_B.weight"] = B.clone(memory_format=torch.contiguous_format)
        save_file(tensors, directory / "adapter_model.safetensors")
        ranks = {module: A.shape[0] for module, (_, A) in factors.items()}
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "rank_pattern": ranks} | config
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    return write


@pytest.fixture(scope="session")
def updates():
    """By module, an adapter's ΔW in float64, from the factors and the scaling that PEFT's layers have."""

    def find(model, adapter_name="default"):
        found = {}
        for name, layer in model.get_base_model().named_modules():
            if adapter_name in getattr(layer, "lora_A", {}):
                B, A = (half[adapter_name].weight.detach().double() for half in (layer.lora_B, layer.lora_A))
                found[name] = (layer.scaling[adapter_name] * B @ A).numpy()
        return found

    return find


@pytest.fixture(scope="session")
def from_spectrum():
    """Factors (B, A), of rank len(sigma), whose product has these singular values, to float64."""

    def make(sigma, d_out=24, d_in=20, seed=0):
        generator = torch.Generator().manual_seed(seed)
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        U, V = (
            torch.linalg.qr(torch.randn(d, len(sigma), generator=generator, dtype=torch.float64)).Q
            for d in (d_out, d_in)
        )
        return U * sigma, V.T.contiguous()

    return make


@pytest.fixture(scope="session")
def in_memory():
    """An open adapter of the given (B, A) by module, with no file, of scaling 1."""
    from lorakit.adapters.config import AdapterSettings
    from lorakit.adapters.parse import assemble
    from lorakit.adapters.read import TensorDict

    def make(factors, path="in memory", **config):
        tensors = {}
        for module, (B, A) in factors.items():
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        ranks = {module: A.shape[0] for module, (_, A) in factors.items()}
        settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
        return assemble(path, AdapterSettings.from_config(settings | config), TensorDict(tensors))

    return make


@pytest.fixture
def data():
    """Five examples to train on."""
    generator = torch.Generator().manual_seed(6)
    ids = [torch.randint(1, 64, (6,), generator=generator) for _ in range(5)]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def evaluate():
    """The losses of four others, in eval mode."""
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(7))

    def run(model):
        assert not model.training
        return F.cross_entropy(model(input_ids=ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    return run
