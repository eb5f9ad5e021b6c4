"""The demo on a tiny model with a tokenizer of its own, run once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lorakit.demo import DemoReport, DemoSettings, run_demo


@dataclass(frozen=True)
class Outcome:
    settings: DemoSettings
    report: DemoReport
    lines: list[str]
    out: Path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("demo") / "model"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def settings(model_directory):
    """Few steps at a high learning rate, so that the adapter learns more than the margin."""
    return DemoSettings(
        model=str(model_directory),
        out=str(model_directory.parent / "out"),
        steps=8,
        batch_size=2,
        length=24,
        learning_rate=1e-2,
        calibration_documents=6,
        held_out_documents=6,
        margin=0.02,
    )


@pytest.fixture(scope="session")
def outcome(settings):
    lines: list[str] = []
    return Outcome(settings, run_demo(settings, lines.append), lines, Path(settings.out))
