"""Configs of both tuners, a tokenizer made here, and sentences of one-letter words to train on."""

from __future__ import annotations

import string

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lorakit import FisherLoRAConfig, SpecLoRAConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
MAKERS = {
    "LORA": lambda **options: LoraConfig(r=6, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM", **options),
    "SPECLORA": lambda **options: SpecLoRAConfig(
        **{"r": 6, "lora_alpha": 12, "k": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    ),
    "SPECLORA-svd": lambda **options: MAKERS["SPECLORA"](mode="svd", **options),
    "FISHERLORA": lambda **options: FisherLoRAConfig(
        r=6, r_q=2, target_modules=TARGETS, task_type="CAUSAL_LM", **options
    ),
}
WORDS = list(string.ascii_lowercase)


@pytest.fixture
def make_lora():
    """Makes a config of PEFT's own LoRA, over the same modules, to compare with."""
    return MAKERS["LORA"]


@pytest.fixture(params=["SPECLORA", "FISHERLORA"])
def make_config(request):
    """Makes a config of either tuner."""
    return MAKERS[request.param]


@pytest.fixture(params=["SPECLORA", "SPECLORA-svd", "FISHERLORA"])
def make_any_config(request):
    """Makes a config of either tuner, or of SpecLoRA in the mode that keeps a block of its own."""
    return MAKERS[request.param]


@pytest.fixture
def load(tiny_llama):
    """Loads what was saved onto a new copy of the base."""
    return lambda path, dtype=torch.float32: PeftModel.from_pretrained(tiny_llama(dtype), path).eval()


@pytest.fixture
def trained(tiny_llama, randomize):
    """Makes a tiny Llama with an adapter that looks trained: no parameter is zero."""

    def make(config, dtype=torch.float32, **options) -> nn.Module:
        return randomize(get_peft_model(tiny_llama(dtype), config, **options))

    return make


@pytest.fixture
def trainable():
    """Copies of the parameters that are trained, by name."""

    def copies(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    return copies


@pytest.fixture
def gradients():
    """The gradients of one batch, by the name of the parameter; every trained parameter must have one."""

    def of(model: nn.Module, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert found
        missing = [name for name, grad in found.items() if grad is None]
        assert not missing
        return {name: grad.clone() for name, grad in found.items()}

    return of


@pytest.fixture(scope="session")
def tokenizer():
    """Knows the letters as words, and fits the tiny models' vocabulary."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def sentences():
    """Makes sentences of 4 to 9 words, the same in every test."""

    def make(count: int) -> list[str]:
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
        return [
            " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths
        ]

    return make


@pytest.fixture(scope="session")
def examples(tokenizer, sentences):
    """Sentences as padded token ids, with labels on what is not padding."""
    batch = tokenizer(sentences(24), padding="max_length", max_length=9, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    return [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in rows]
