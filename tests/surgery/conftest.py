"""A trained-looking adapter, and calibration examples batched in any way."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

LENGTHS = [5, 7, 9, 4, 6, 8, 3, 2]
UNLABELLED = 3


@pytest.fixture(scope="session")
def examples():
    """Token ids of ragged lengths; labels start at the first token, and one example has none."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]
    labels = [torch.full_like(i, -100) if n == UNLABELLED else i.clone() for n, i in enumerate(ids)]
    labels[1][:3] = -100
    return list(zip(ids, labels, strict=True))


@pytest.fixture(scope="session")
def batches(examples):
    """Batches of any size, order and padding side."""

    def make(batch_size=2, *, side="right", order=None, pad_to=0):
        chosen = [examples[i] for i in (order or range(len(examples)))]
        made = []
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            width = max(pad_to, *(len(ids) for ids, _ in part))
            batch = {
                key: torch.full((len(part), width), fill)
                for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
            }
            for row, (ids, labels) in enumerate(part):
                place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
                batch["input_ids"][row, place] = ids
                batch["attention_mask"][row, place] = 1
                batch["labels"][row, place] = labels
            made.append(batch)
        return made

    return make


@pytest.fixture
def adapted(tiny_llama, randomize):
    """A tiny Llama with a LoRA of random values on all its linear modules."""

    def make(config=None, dtype=torch.float32, base=None, **options) -> nn.Module:
        config = config or LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        model = get_peft_model(base or tiny_llama(dtype), config, autocast_adapter_dtype=False)
        return randomize(model, std=0.3)

    return make


@pytest.fixture
def saved(adapted, base_model, tmp_path):
    """Directories of a base model and of an adapter for it, and files of rows to calibrate on and to be judged by."""
    adapted().save_pretrained(tmp_path / "adapter")
    places = {"base": base_model, "adapter": tmp_path / "adapter"}
    for name, start in (("calibration", 0), ("own", 20), ("other", 40)):
        rows = [{"text": f"w{i % 60} w{(2 * i + 1) % 60} w{(3 * i) % 60} w{i % 7}"} for i in range(start, start + 12)]
        places[name] = tmp_path / f"{name}.jsonl"
        places[name].write_text("\n".join(map(json.dumps, rows)))
    return places
