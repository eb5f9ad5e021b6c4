"""The run of docs/evidence/arc-easy.md: a LoRA of rank 64 trained on ARC-Easy, and the smallest adapter that passes.

    python benchmarks/arc_easy.py STAGE --data DIR --out DIR

The DIR of `--data` holds arc_easy_train.jsonl and arc_easy_test.jsonl: ARC-Easy (Clark et al., 2018; allenai/ai2_arc on
the Hub), one document a line with `question`, `choices` (a list of texts) and `answer` (the right one's index). Stages,
in order: `train`, `audit`, `smallest`, `agree`. What an earlier call has finished is not done again: training goes on
from its last checkpoint, and scores are kept in a cache. Nothing is tuned: the settings stand below. The bench of the
same page is `lorakit bench benchmarks/recipes/arc_easy.yaml`, run in the directory of `--out`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from lorakit.demo import load_model

RANK, ALPHA, LEARNING_RATE, EPOCHS, BATCH_SIZE, LENGTH, SEED = 64, 64, 2e-4, 1, 8, 128, 0
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
    known = [completion(row) for row in train]  # ARC-Easy has a few questions in both of its parts
    write_rows(out / "test_loss.jsonl", [row for row in map(completion, test) if row not in known])
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


def audit() -> None:
    """What the spectra say about the ranks."""
    from lorakit.lens import audit as audit_adapter
    from lorakit.lens import write_html

    report = audit_adapter("adapter", energy=0.9)
    Path("audit.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    write_html(report, "audit.html")
    print(report)


def smallest() -> None:
    """The smallest served rank that is within two points of the adapter, on all test questions; and the base model."""
    from lorakit import compress, evaluation

    task = evaluation.choices("test.jsonl", name="arc_easy")
    report = compress.smallest(
        "adapter", "small", base="base", tasks=task, margin=MARGIN, cache="cache", overwrite=True
    )
    Path("smallest.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    print(report)
    report.certificate.save("certificate.json")
    report.certificate.to_html("certificate.html")
    model = evaluation.load_base("base")
    scores = evaluation.evaluate(model, task, cache="cache")["arc_easy"]
    Path("base.json").write_text(json.dumps(scores.to_dict()), encoding="utf-8")
    print(scores)


def agree() -> None:
    """How far the small adapter's predictions are the trained one's, on texts that are not questions."""
    from lorakit.evaluation import agreement

    found = agreement("base", "adapter", "small", "documentation.jsonl", length=LENGTH, num_examples=150, batch_size=4)
    Path("agreement.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    print(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "audit", "smallest", "agree"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = options.data.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)  # so that what is written names base/, not a path of this machine
    if options.stage == "train":
        prepare(data, Path())
        train(Path())
    else:
        {"audit": audit, "smallest": smallest, "agree": agree}[options.stage]()


if __name__ == "__main__":
    main()
