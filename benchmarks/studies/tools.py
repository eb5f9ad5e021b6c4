"""What the studies on SmolLM2 share: the splits, a training, the scores of an adapter, and the records.

All splits go by the order of the SHA-256 of a document's question; `splits.json`, which was committed before any run,
holds how many documents each has and a hash over them, and a run whose splits differ stops.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from peft import PeftConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoTokenizer, set_seed

from lorakit import evaluation
from lorakit.adapters.atomic import replaced_directory
from lorakit.data import loader
from lorakit.demo import load_model
from lorakit.experiments import Trial, run_plan
from lorakit.experiments._methods import prepared, removed_parameters
from lorakit.experiments._settings import TrainSettings
from lorakit.experiments._training import batches_of, train_adapter

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
LENGTH, BATCH_SIZE = 128, 8
SEEDS = (0, 1, 2)
GRID = (1e-3, 3e-3, 1e-2)  # learning rates, for every method
DTYPE = "bfloat16"  # that adapters are scored in; they are trained in float32

# Questions of each set, in the order in which they are taken from the training part.
SETS = ("arc_easy", "openbookqa")
TRAIN_PARTS = {"train": 480, "validation": 64, "calibration": 256, "selection": 128, "more": 480}
TEST_DOCUMENTS = {"arc_easy": 500, "openbookqa": 250}
DOCUMENTATION = 128  # texts of Python's documentation, a guard


def splits(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The documents of every split, by its name, such as "arc_easy_train"."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in SETS:
        test = _in_order(data / f"{name}_test.jsonl", known=())
        asked = {row["question"] for row in test}
        found[f"{name}_test"] = test[: TEST_DOCUMENTS[name]]
        rest = _in_order(data / f"{name}_train.jsonl", known=asked)
        for part, count in TRAIN_PARTS.items():
            found[f"{name}_{part}"], rest = rest[:count], rest[count:]
    texts = dict.fromkeys(" ".join(text.split())[:600] for _, text in sorted(topics.items()))
    found["documentation"] = [{"text": text} for text in sorted(texts, key=_hash)[:DOCUMENTATION]]
    return found


def _in_order(path: Path, known: Any) -> list[dict[str, Any]]:
    """A file's questions by their hashes, each once, without those of `known`."""
    rows = {row["question"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    return [rows[question] for question in sorted(rows, key=_hash) if question not in known]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digests(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """How many documents each split has, and a hash over them."""
    return {
        name: {"documents": len(rows), "sha256": _hash("\n".join(json.dumps(row, sort_keys=True) for row in rows))}
        for name, rows in found.items()
    }


def completion(document: Mapping[str, Any]) -> dict[str, str]:
    """A question as `lorakit.evaluation.choices` asks it, and its right answer."""
    answer = document["choices"][document["answer"]]
    return {"prompt": f"Question: {document['question']}\nAnswer:", "completion": f" {answer}"}


def prepare(data: Path, out: Path) -> None:
    """Check the splits against `splits.json`, and write them and the base model to `out`.

    The training data of a fraction is the first documents of each set, so that a tenth is part of the half.
    """
    found = splits(data)
    if digests(found) != json.loads((HERE / "splits.json").read_text(encoding="utf-8")):
        raise SystemExit("The data or Python's documentation are not those of splits.json: other splits would result.")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "base" / "config.json").exists():
        model, tokenizer = load_model(None)
        tokenizer.save_pretrained(out / "base")
        model.save_pretrained(out / "base")
    for name in SETS:
        _write(out / f"{name}_test.jsonl", found[f"{name}_test"])
        for part in TRAIN_PARTS:
            _write(out / f"{name}_{part}.jsonl", map(completion, found[f"{name}_{part}"]))
        _write(out / f"{name}_loss.jsonl", map(completion, found[f"{name}_test"]))
    for part in TRAIN_PARTS:
        for share in (1.0, 0.5, 0.1) if part == "train" else (1.0,):
            rows = [found[f"{name}_{part}"][: round(share * TRAIN_PARTS[part])] for name in SETS]
            file = f"{part}.jsonl" if share == 1 else f"{part}_{share}.jsonl"
            _write(out / file, map(completion, (row for pair in zip(*rows, strict=True) for row in pair)))
    alone = found["arc_easy_train"] + found["arc_easy_more"]  # where OpenBookQA is the shifted set
    _write(out / "arc_easy_alone.jsonl", map(completion, alone))
    _write(out / "documentation.jsonl", found["documentation"])


def _write(path: Path, rows: Any) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def train(
    out: Path,
    config: PeftConfig,
    target: Path,
    *,
    seed: int,
    learning_rate: float,
    steps: int,
    data: str = "train.jsonl",
    initialize: Callable[[Any, Any], None] | None = None,
) -> dict[str, Any]:
    """Train one adapter and write it; its parameters, the training loss, and losses of the validation documents.

    `initialize` gets the model with the adapter and the examples, before the training.
    """
    base = str(out / "base")
    model, tokenizer = evaluation.load_base(base), AutoTokenizer.from_pretrained(base)
    examples = loader(out / data, tokenizer, length=LENGTH, batch_size=BATCH_SIZE, progress=False)
    settings = TrainSettings(
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        weight_decay=0.0,
        warmup_steps=None,
        schedule="linear",
        collate_fn=examples.collate_fn,
        train=None,
        group_by_length=True,
    )
    set_seed(seed)
    adapted = get_peft_model(model, prepared(target.name, config, steps, own_loop=initialize is not None))
    if initialize is not None:
        initialize(adapted, examples)
    parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    with tqdm(total=steps, desc=target.name, unit="step") as bar:
        loss = train_adapter(adapted, batches_of(examples.dataset, settings, seed, bar), settings, seed, target.name)
    adapted.eval()
    parameters -= removed_parameters(adapted, adapted.peft_config["default"])
    task = evaluation.loss(str(out / "validation.jsonl"), length=LENGTH, batch_size=BATCH_SIZE)
    scores = evaluation.evaluate(adapted, task, tokenizer=tokenizer, progress=False)["validation"]
    with replaced_directory(target) as directory:
        adapted.save_pretrained(str(directory))
    return {
        "parameters": parameters,
        "train_loss": loss,
        "validation": [-score for score in scores.scores],
    }


def score(out: Path, adapter: Path | None) -> dict[str, Any]:
    """The scores of every test document: right or wrong, and minus the loss of the right answer; None: the base."""
    base = str(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = evaluation.LoadOptions(dtype=DTYPE)
    model = (
        evaluation.load_base(base, options) if adapter is None else evaluation.load_adapted(base, str(adapter), options)
    )
    tasks = [evaluation.choices(out / f"{name}_test.jsonl", name=name) for name in SETS]
    for name in (*(f"{name}_loss" for name in SETS), "documentation"):
        tasks.append(evaluation.loss(str(out / f"{name}.jsonl"), length=LENGTH, batch_size=BATCH_SIZE))
    found = evaluation.evaluate(model, tasks, tokenizer=tokenizer, progress=False)
    return {
        name: {"documents": list(scores.documents), "scores": [round(s, 6) for s in scores.scores]}
        for name, scores in found.items()
    }


def recorded(
    study: str, key: str, function: Callable[..., dict[str, Any]], settings: Mapping[str, Any], **given: Any
) -> dict[str, Any]:
    """The record of one trial of a study, which is run if there is none yet."""
    trial = Trial(key, function, given, settings)
    return run_plan([trial], RECORDS / study, progress=False)[key]


def best_rate(trainings: Mapping[float, Mapping[str, Any]]) -> float:
    """The learning rate whose training, a record of `train`, has the lowest validation loss."""
    return min(trainings, key=lambda rate: sum(trainings[rate]["validation"]))


def arguments(description: str | None, stages: Sequence[str]) -> argparse.Namespace:
    """The options of a study's script; the splits are then ready in `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="+", choices=stages)
    parser.add_argument("--data", type=Path, required=True, help="holds arc_easy_train.jsonl and the other files")
    parser.add_argument("--out", type=Path, required=True, help="for the base model and the adapters")
    options = parser.parse_args()
    prepare(options.data.resolve(), options.out.resolve())
    return options


if __name__ == "__main__":
    json.dump(digests(splits(Path(sys.argv[1]))), sys.stdout, indent=1)
