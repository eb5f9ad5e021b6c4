"""The run of docs/evidence/arc-easy.md: a LoRA of rank 64 trained on ARC-Easy, and the smallest adapter that passes.

    python benchmarks/arc_easy.py STAGE --data DIR --out DIR

The DIR of `--data` holds arc_easy_train.jsonl and arc_easy_test.jsonl: ARC-Easy (Clark et al., 2018; allenai/ai2_arc on
the Hub), one document a line with `question`, `choices` (a list of texts) and `answer` (the right one's index).

Stages, in order: `train`, `audit`, `smallest`, `agree`, and `page`, which writes docs/evidence. What an earlier call
has finished is not done again: training goes on from its last checkpoint, and scores are kept in a cache. Nothing is
tuned: the settings stand below. The bench of the same page is `lorakit bench benchmarks/recipes/arc_easy.yaml`, run in
the directory of `--out` before `page`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
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
    texts = dict.fromkeys(" ".join(text.split())[:600] for _, text in sorted(topics.items()))  # some are equal
    write_rows(out / "documentation.jsonl", [{"text": text} for text in texts])


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

    report = audit_adapter("adapter", energy=0.9, suggest_ranks=True)
    Path("audit.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    write_html(report, "audit.html")
    keep("audit", report)


def smallest() -> None:
    """The smallest served rank that is within two points of the adapter, on all test questions; and the base model."""
    from lorakit import compress, evaluation

    task = evaluation.choices("test.jsonl", name="arc_easy")
    report = compress.smallest(
        "adapter", "small", base="base", tasks=task, margin=MARGIN, cache="cache", overwrite=True
    )
    Path("smallest.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    keep("smallest", report)
    report.plot().savefig("smallest.png", dpi=110)
    report.certificate.save("certificate.json")
    report.certificate.to_html("certificate.html")
    Path("model-card.md").write_text(report.certificate.to_model_card(), encoding="utf-8")
    model = evaluation.load_base("base")
    scores = evaluation.evaluate(model, task, cache="cache")["arc_easy"]
    Path("base.json").write_text(json.dumps(scores.to_dict()), encoding="utf-8")
    reference = report.certificate.tasks[0].reference_scores[0]
    gain = evaluation.paired_interval(scores.scores, reference)
    keep(
        "base",
        f"base model {scores.mean:.4f}; the adapter gains {gain.difference:+.4f}, between {gain.lower:+.4f} and "
        f"{gain.upper:+.4f} (one-sided bounds, each at level 0.05, {len(reference)} questions)",
    )


def agree() -> None:
    """How far the small adapter's predictions are the trained one's, on texts that are not questions."""
    from lorakit.evaluation import agreement

    found = agreement("base", "adapter", "small", "documentation.jsonl", length=LENGTH, batch_size=4)
    Path("agreement.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    keep("agree", found)


def keep(name: str, report: object) -> None:
    """Print a report, and keep its text for the page."""
    print(report)
    Path(f"{name}.txt").write_text(f"{report}\n", encoding="utf-8")


BOUNDS = ("difference", "lower", "upper", "verdict")


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers that are not integers have four decimals."""
    lines = [list(headings), ["---"] * len(headings)]
    lines += [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(docs: Path) -> None:
    """docs/evidence/arc-easy.md and the files that it links to, from what the other stages left."""
    from importlib.metadata import version

    from lorakit.evaluation import read_certificate
    from lorakit.experiments import read_bench

    certificate = read_certificate("certificate.json")
    certificate.verify()
    bench = read_bench("bench/bench.json")
    bench.plot().savefig("bench.png", dpi=110)
    target = docs / "evidence" / "arc-easy"
    target.mkdir(parents=True, exist_ok=True)
    copied = ("certificate.json", "certificate.html", "model-card.md", "agreement.json", "smallest.png", "bench.png")
    for name in copied:
        shutil.copy(name, target / name)
    for name in ("bench.json", "report.html"):
        shutil.copy(Path("bench", name), target / name.replace("report", "bench"))
    texts = {
        name: Path(f"{name}.txt").read_text(encoding="utf-8").rstrip()
        for name in ("audit", "base", "smallest", "agree")
    }
    training = json.loads(Path("training.json").read_text(encoding="utf-8"))
    losses = [row["loss"] for row in training if "loss" in row]
    fields = texts | {
        "texts": str(len(json.loads(Path("agreement.json").read_text(encoding="utf-8"))["documents"])),
        "bench": str(bench),
        "steps": table(
            ("rank", "size, MB", "energy kept", "difference", "lower", "upper", "verdict"),
            [
                (
                    step["rank"],
                    step["size_bytes"] / 1e6,
                    step["energy_kept"],
                    *(step["certificate"][key] for key in BOUNDS),
                )
                for step in json.loads(Path("smallest.json").read_text(encoding="utf-8"))["steps"]
            ],
        ),
        "variants": table(
            ("variant", "parameters", "difference", "lower", "upper", "worst seed", "verdict"),
            [
                [row[key] for key in ("name", "parameters", *BOUNDS[:3], "worst_seed_difference", "verdict")]
                for row in bench.rows()
            ],
        ),
        "training": f"{losses[0]:.2f} at first and {losses[-1]:.2f} in the end",
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "lm-eval")
        ),
    }
    text = TEMPLATE
    for name, value in fields.items():
        text = text.replace(f"<{name}>", value)
    (target.parent / "arc-easy.md").write_text(text, encoding="utf-8")


TEMPLATE = """# One adapter from training to certificate: ARC-Easy

SmolLM2-135M-Instruct, a LoRA of rank 64 in all linear modules, all 2,376 test questions. Written by
`benchmarks/arc_easy.py`; every figure below is its output, of one thread of an AMD EPYC in float32.

<versions>

## Training

TRL's SFTTrainer, one epoch over 2,000 of the training questions (the other 251 are left for choosing), each a prompt
`Question: … Answer:` and the right answer as the completion. Learning rate 2e-4, batches of 8, alpha 64, nothing
tuned. The loss of a batch was <training>. What the adapter gains over the base model:

```text
<base>
```

## Audit

```text
<audit>
```

## The smallest rank that passes

The margin, 2 points of accuracy, was fixed beforehand. The ranks are tested from large to small on all test questions,
and the first that does not PASS ends the search.

```text
<smallest>
```

<steps>

![differences by rank](arc-easy/smallest.png)

[Certificate](arc-easy/certificate.json), which `lorakit certify --verify` checks;
[the same as a page](arc-easy/certificate.html); [the section of the model card](arc-easy/model-card.md).

## Agreement without labels

On <texts> texts of Python's documentation, which are nothing like the questions:

```text
<agree>
```

## Bench

`lorakit bench benchmarks/recipes/arc_easy.yaml`: probes of rank 64 trained on 160 questions, three seeds, held-out loss
of 200 answers, margin 0.05 nats a token. It is short, so that anybody can run it; it says nothing about longer
trainings.

```text
<bench>
```

<variants>

![bench](arc-easy/bench.png)

[bench.json](arc-easy/bench.json); [the report as a page](arc-easy/bench.html).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "audit", "smallest", "agree", "page"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data, docs = options.data.resolve(), Path(__file__).resolve().parents[1] / "docs"
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)  # so that what is written names base/, not a path of this machine
    if options.stage == "train":
        prepare(data, Path())
        train(Path())
    elif options.stage == "page":
        page(docs)
    else:
        {"audit": audit, "smallest": smallest, "agree": agree}[options.stage]()


if __name__ == "__main__":
    main()
