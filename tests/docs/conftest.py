"""The files that the documentation's examples use: a tiny model with a tokenizer, trained adapters, and texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

CHAT = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TEXTS = [
    "the adapter learns a low rank update of the weight .",
    "a large rank is trained and a small rank is what the layer keeps .",
    "the server reads the adapter and the base model .",
    "most of the update is in the singular values of the query weight .",
    "training data is text and the loss is low .",
    "which layer loses most when the rank is smaller ?",
    "the value weights learn a large update and the query weights a small update .",
    "the user writes text and the assistant reads the text .",
]
WORDS = sorted({"user", "assistant", *(word for text in TEXTS for word in text.split())})


@pytest.fixture(scope="session")
def example_files(tmp_path_factory) -> Path:
    """A directory with everything that `docs/examples.md` names."""
    root = tmp_path_factory.mktemp("examples")
    ids = _write_base(root / "base")
    with torch.random.fork_rng():
        for seed, (name, rank) in enumerate({"adapter": 8, "a": 4, "b": 4, "r2": 2, "r4": 4, "r8": 8}.items()):
            _train(root / "base", root / name, ids, rank, seed)
    _merge(root / "base", root / "adapter", root / "tuned")
    _write_rows(root / "examples.jsonl", [{"text": text} for text in TEXTS])
    _write_rows(root / "train.jsonl", [{"text": text} for text in TEXTS[:4]])
    _write_rows(root / "test.jsonl", [{"text": text} for text in TEXTS[4:]])
    # What `make demo` leaves, as far as the README uses it.
    (root / "demo-output").mkdir()
    shutil.copytree(root / "base", root / "demo-output" / "base")
    shutil.copytree(root / "adapter", root / "demo-output" / "lora")
    _write_rows(root / "demo-output" / "held-out.jsonl", [{"text": text} for text in TEXTS[4:]])
    return root


def _write_base(directory: Path) -> torch.Tensor:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=CHAT
    )
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=128,
        pad_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(directory)
    return tokenizer(TEXTS, return_tensors="pt", padding=True)["input_ids"]


def _train(base: Path, out: Path, ids: torch.Tensor, rank: int, seed: int) -> None:
    """A few steps of plain LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = "base/"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids.where(ids != 1, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def _merge(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
