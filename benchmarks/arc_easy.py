"""The run on real data of docs/evidence: a LoRA of rank 64 for ARC-Easy, its audit, and the smallest adapter that passes.

    python benchmarks/arc_easy.py STAGE --data DIR --out DIR

DIR of `--data` holds arc_easy_train.jsonl and arc_easy_test.jsonl: ARC-Easy (Clark et al., 2018; allenai/ai2_arc on the
Hub), one document a line with `question`, `choices` (a list of texts) and `answer` (the index of the right one).
The stages, in order: `train`, `audit`, `smallest`, `certify`, `agree`. Each skips what an earlier call has finished, and
training goes on from its last checkpoint, so an interrupted run is simply started again. Nothing is tuned: the settings
stand below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from lorakit.demo import load_model

RANK, ALPHA, LEARNING_RATE, EPOCHS, BATCH_SIZE, LENGTH, SEED = 64, 64, 2e-4, 2, 8, 128, 0
HELD_BACK = 251  # training questions that are left for choosing, by the order of their hashes
MARGIN = 0.02


def rows(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, documents: list[dict[str, Any]]) -> None:
    """Write a JSON lines file beside its place, then move it there."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents), encoding="utf-8")
    partial.replace(path)


def completion(document: dict[str, Any]) -> dict[str, str]:
    """A question as the task `lorakit.evaluation.choices` asks it, and its right answer."""
    return {
        "prompt": f"Question: {document['question']}\nAnswer:",
        "completion": " " + document["choices"][document["answer"]],
    }


def prepare(data: Path, out: Path) -> None:
    """The base model, and the splits: train.jsonl, selection.jsonl, test.jsonl (choices), test_loss.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "base" / "config.json").exists():
        model, tokenizer = load_model(None)
        model.save_pretrained(out / "base")
        tokenizer.save_pretrained(out / "base")
    train = rows(data / "arc_easy_train.jsonl")
    test = rows(data / "arc_easy_test.jsonl")
    train.sort(key=lambda row: hashlib.sha256(row["question"].encode()).hexdigest())
    write_rows(out / "selection.jsonl", [completion(row) for row in train[:HELD_BACK]])
    write_rows(out / "train.jsonl", [completion(row) for row in train[HELD_BACK:]])
    write_rows(out / "test.jsonl", test)
    write_rows(out / "test_loss.jsonl", [completion(row) for row in test])
    prompts = [{"text": " ".join(text.split())[:600]} for _, text in sorted(topics.items())]
    write_rows(out / "documentation.jsonl", prompts)


def train(out: Path) -> None:
    """A LoRA in all linear modules, by TRL's SFTTrainer, on the answers alone."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    adapter = out / "adapter"
    if (adapter / "adapter_model.safetensors").exists():
        return
    base = str(out / "base")
    arguments = SFTConfig(
        output_dir=str(out / "training"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_length=LENGTH,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        seed=SEED,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(out / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=any((out / "training").glob("checkpoint-*")))
    (out / "training.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
    trainer.save_model(str(adapter))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train",))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prepare(options.data, options.out)
    train(options.out)


if __name__ == "__main__":
    main()
