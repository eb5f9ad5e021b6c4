"""Byte-level tokenizers made here, and files of rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the sky is blue because light of short waves is scattered more than light of long ones and what do you know"


@pytest.fixture(scope="session")
def _trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


@pytest.fixture
def make_tokenizer(_trained) -> Callable[..., Any]:
    """Makes a tokenizer with EOS, and of a given template; with `bos` it begins every text."""

    def make(template: str | None = None, *, bos: bool = False, **tokens: str | None) -> Any:
        inner = copy.deepcopy(_trained)
        if bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
            )
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | tokens
        made = PreTrainedTokenizerFast(
            tokenizer_object=inner, **{name: token for name, token in names.items() if token is not None}
        )
        made.chat_template = template
        return made

    return make


@pytest.fixture
def write(tmp_path) -> Callable[..., Any]:
    """Writes rows as JSON lines, or any text."""

    def to(name: str, content: Any) -> Any:
        path = tmp_path / name
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content)) + "\n"
        path.write_text(text, encoding="utf-8")
        return path

    return to
