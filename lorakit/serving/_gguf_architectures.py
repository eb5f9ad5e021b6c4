"""What llama.cpp's conversion does to a base model's weights: tensor names, and the row order of queries and keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ExportError, MissingExtraError

_PASS_CONFIG = "Pass `base_config`: the base model's directory or config.json, or the config as a dict."


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`; `name` is the member of `gguf.MODEL_ARCH`.

    `permutes`: the conversion interleaves the two rotary halves of each head in the rows of q_proj and k_proj.
    `tied`: transformers' default for `tie_word_embeddings`.
    """

    name: str
    model_types: tuple[str, ...]
    class_names: tuple[str, ...]
    permutes: bool = False
    tied: bool = False


# References: llama.cpp's conversion/llama.py, qwen.py, gemma.py and phi.py, as in llama-cpp-python 0.3.36.
ARCHITECTURES = (
    Architecture("LLAMA", ("llama", "mistral"), ("LlamaForCausalLM", "MistralForCausalLM"), permutes=True),
    Architecture("SMOLLM3", ("smollm3",), ("SmolLM3ForCausalLM",), permutes=True, tied=True),
    Architecture("QWEN2", ("qwen2",), ("Qwen2ForCausalLM",)),
    Architecture("QWEN3", ("qwen3",), ("Qwen3ForCausalLM",)),
    Architecture("GEMMA", ("gemma",), ("GemmaForCausalLM",), tied=True),
    Architecture("GEMMA2", ("gemma2",), ("Gemma2ForCausalLM",), tied=True),
    Architecture(
        "GEMMA3", ("gemma3", "gemma3_text"), ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), tied=True
    ),
    Architecture("PHI3", ("phi3",), ("Phi3ForCausalLM",)),
)


@dataclass(frozen=True)
class BaseModel:
    """The base model as far as an adapter's GGUF needs it. `kv_heads` and `vocabulary` are None where unknown."""

    architecture: Architecture
    layers: int
    heads: int
    kv_heads: int | None
    head_dim: int
    vocabulary: int | None
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseModel:
        """Read a transformers config; of a multimodal model, its text part.

        Raises: ExportError for an architecture that is not in `ARCHITECTURES`, and sizes that are missing or invalid.
        """
        architecture = _architecture(config)
        text = config.get("text_config")
        values = {**config, **text} if isinstance(text, Mapping) else dict(config)
        layers, heads, hidden = (
            _positive(values, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
        optional = ("num_key_value_heads", "head_dim", "vocab_size")
        kv_heads, head_dim, vocabulary = (
            None if values.get(name) is None else _positive(values, name) for name in optional
        )
        tied = values.get("tie_word_embeddings")
        return cls(
            architecture=architecture,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=hidden // heads if head_dim is None else head_dim,
            vocabulary=vocabulary,
            tied=architecture.tied if tied is None else bool(tied),
        )

    @property
    def name(self) -> str:
        """The value of ``general.architecture``."""
        gguf = import_gguf()
        return str(gguf.MODEL_ARCH_NAMES[self._gguf_arch()])

    def tensor_names(self, module_names: list[str]) -> dict[str, str]:
        """The GGUF tensor of each module's weight, such as ``blk.0.attn_q.weight``.

        Raises: ExportError for modules without one, and for an embedding or a head where these are tied.
        """
        name_map = import_gguf().get_tensor_name_map(self._gguf_arch(), self.layers)
        names: dict[str, str] = {}
        unmapped = []
        for module_name in module_names:
            plain = re.sub(r"(^|\.)language_model\.", r"\1", module_name)
            plain = plain if plain.startswith(("model.", "lm_head")) else f"model.{plain}"
            found = name_map.get_name(f"{plain}.weight", try_suffixes=(".weight",))
            if plain in ("model.embed_tokens", "lm_head") and self.tied:
                raise ExportError(
                    f"{module_name!r} is adapted, and the base model ties its embedding to its output head: llama.cpp "
                    f"has one tensor for both and cannot load such an adapter. Train without it, or merge the adapter "
                    f"into the model and convert that."
                )
            if found is None:
                unmapped.append(module_name)
            else:
                names[module_name] = str(found)
        if unmapped:
            raise ExportError(
                f"{len(unmapped)} of the adapter's modules have no tensor in llama.cpp's {self.name!r} models with "
                f"{self.layers} layers: {', '.join(map(repr, unmapped[:3]))}{', …' if len(unmapped) > 3 else ''}. "
                f"Does `base_config` belong to this adapter?"
            )
        return names

    def permuted_heads(self, module_name: str, d_out: int) -> int | None:
        """The number of heads whose rows the conversion permutes; None for modules that it leaves as they are.

        Raises: ExportError where `d_out` is not that of this base model.
        """
        leaf = module_name.rpartition(".")[2]
        if not self.architecture.permutes or leaf not in ("q_proj", "k_proj"):
            return None
        expected = self.heads if leaf == "q_proj" else self.kv_heads
        heads = d_out // self.head_dim
        if heads * self.head_dim != d_out or self.head_dim % 2 or (expected is not None and heads != expected):
            raise ExportError(
                f"`base_config` must be that of the model that the adapter was trained on: {module_name!r} has {d_out} "
                f"rows, the config says {'' if expected is None else f'{expected} '}heads of {self.head_dim}."
            )
        return heads

    def _gguf_arch(self) -> Any:
        return getattr(import_gguf().MODEL_ARCH, self.architecture.name)


def import_gguf() -> Any:
    """The package `gguf`. Raises: MissingExtraError."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'lorakit[gguf]'.") from error
    return gguf


def read_base_config(base_config: str | os.PathLike[str] | Mapping[str, Any] | None, recorded: str | None) -> BaseModel:
    """The base model of `base_config`, or else of `recorded`, the directory or Hub id that the adapter names.

    Raises: ExportError.
    """
    if isinstance(base_config, Mapping):
        return BaseModel.from_config(base_config)
    if base_config is None and recorded is None:
        raise ExportError(f"The adapter does not say what its base model is. {_PASS_CONFIG}")
    path = Path(os.fspath(base_config) if base_config is not None else str(recorded))
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        if base_config is not None:
            raise ExportError(
                f"`base_config` must be a directory with a config.json, or that file; got {os.fspath(base_config)!r}."
            )
        path = _download(str(recorded))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"The base model's config, {os.fspath(path)!r}, cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ExportError(f"The base model's config, {os.fspath(path)!r}, must be a JSON object.")
    return BaseModel.from_config(config)


def _download(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except Exception as error:  # of many kinds: no network, offline mode, not a Hub id, no access
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ExportError(
            f"The config of the base model {repo_id!r} was not found ({reason}). {_PASS_CONFIG}"
        ) from error


def _architecture(config: Mapping[str, Any]) -> Architecture:
    """By class name where the config has it: other classes of a model type are other architectures of llama.cpp's."""
    class_names = config.get("architectures") or []
    model_type = config.get("model_type")
    for row in ARCHITECTURES:
        if class_names[0] in row.class_names if class_names else model_type in row.model_types:
            return row
    known = sorted(name for row in ARCHITECTURES for name in row.class_names)
    came = f"architectures={class_names}" if class_names else f"model_type={model_type!r}"
    raise ExportError(f"The base model's config has {came}; GGUF can be written for {', '.join(known)}.")


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ExportError(f"`{name}` in the base model's config must be a positive integer; got {value!r}.")
    return value
