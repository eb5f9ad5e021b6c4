"""The cases of tests/attacks, and the adapter that they change."""

from __future__ import annotations

import copy
import json
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "base",
}
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def cases(name):
    return json.loads((Path(__file__).parents[1] / "attacks" / f"{name}.json").read_text())


def content_of(case, good):
    """The text of a case's file: as it is given, or `good` with changes."""
    if "text" in case:
        return None if case["text"] is None else case["text"] * case.get("times", 1)
    return json.dumps({**copy.deepcopy(good), **case["changes"]})
