"""Whether lorakit.lens.compare's forecast of a merge agrees with what the merge keeps, on SmolLM2-135M-Instruct.

    python benchmarks/merge_forecast.py STAGE --data DIR --out DIR

The DIR of `--data` holds JSON lines files: arc_easy and openbookqa with `question`, `choices` and `answer` (the right
one's index), and cola with `sentence` and `label`, each as NAME_train.jsonl and NAME_test.jsonl or NAME_dev.jsonl. The
fourth set of texts is the documentation that comes with Python.

Stages, in order: `train`, `merge`, and `page`, which writes docs/evidence from the merges that are finished. What an
earlier call has finished is not done again. Nothing is tuned: the settings stand below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

RANK, ALPHA, LEARNING_RATE, STEPS, BATCH_SIZE, LENGTH, SEED = 8, 16, 5e-4, 40, 4, 64, 0
DOCUMENTS = 40
TASKS = ("arc_easy", "openbookqa", "cola", "documentation")
RECIPES: dict[str, dict[str, Any]] = {
    "linear-half": {"method": "linear", "weights": (0.5, 0.5)},
    "linear-uneven": {"method": "linear", "weights": (0.8, 0.2)},
    "linear-full": {"method": "linear", "weights": (1.0, 1.0)},
    "ties": {"method": "ties", "weights": (0.5, 0.5), "density": 0.5},
}
FORECASTS = ("strength", "directions")
BASELINES = ("weight", "uncut")  # what is known without a forecast
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def write_json(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def example(row: dict[str, Any]) -> dict[str, str]:
    """A document as a prompt and its completion."""
    if "sentence" in row:
        prompt = f"Sentence: {row['sentence']}\nIs this sentence grammatical?"
        return {"prompt": prompt, "completion": " yes" if row["label"] else " no"}
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": " " + row["choices"][row["answer"]]}


def documents(data: Path, task: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training and held-out documents of a task, in the order of their hashes, with nothing in both."""
    if task == "documentation":
        texts = dict.fromkeys(" ".join(text.split())[:400] for _, text in sorted(topics.items()))
        rows = ordered([{"text": text} for text in texts])
        return rows[DOCUMENTS:], rows[:DOCUMENTS]
    files = [data / f"{task}_{part}.jsonl" for part in ("train", "test", "dev")]
    train, held_out = (
        ordered([example(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()])
        for file in files
        if file.exists()
    )
    return train, [row for row in held_out if row not in train][:DOCUMENTS]


def ordered(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows in the order of their hashes."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest())


def train(data: Path, out: Path) -> None:
    """The base model, the documents and one LoRA for each task."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.data import loader
    from lorakit.demo import load_model

    base = out / "base"
    if not (base / "config.json").exists():
        model, tokenizer = load_model(None)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for task in TASKS:
        if (out / task / "adapter_model.safetensors").exists():
            continue
        rows, held_out = documents(data, task)
        for name, content in ((f"{task}-train", rows[: STEPS * BATCH_SIZE]), (f"{task}-test", held_out)):
            write_json(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in content))
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        tuned = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LEARNING_RATE)
        batches = list(loader(str(out / f"{task}-train.jsonl"), tokenizer, length=LENGTH, batch_size=BATCH_SIZE))
        losses = []
        for step in tqdm(range(STEPS), desc=task):
            loss = tuned(**batches[step % len(batches)], use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        write_json(out / f"{task}-training.json", json.dumps(losses))
        tuned.save_pretrained(out / task)


def score(out: Path, adapter: Path | None, tasks: Sequence[str]) -> dict[str, list[float]]:
    """The score of every held-out document of some tasks: minus its loss, in nats a token."""
    from lorakit import evaluation
    from lorakit.data import tokenizer_for

    base = _base(str(out / "base"))
    held_out = [evaluation.loss(str(out / f"{task}-test.jsonl"), name=task, length=LENGTH) for task in tasks]
    options: dict[str, Any] = {"tokenizer": tokenizer_for(str(out / "base")), "progress": False}
    if adapter is None:
        found = evaluation.evaluate(base, held_out, **options)
    else:
        (found,) = evaluation.evaluate_adapters(base, [str(adapter)], held_out, **options).values()
    return {name: list(scores.scores) for name, scores in found.items()}


@cache
def _base(path: str) -> Any:
    from lorakit import evaluation

    return evaluation.load_base(path)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds, made first where it is not there."""
    if not path.exists():
        write_json(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def merge(out: Path, *, only_finished: bool = False) -> list[dict[str, Any]]:
    """For each merge the forecast, and the scores of base, adapters and merge on both tasks."""
    records = out / "records"
    records.mkdir(exist_ok=True)
    base = kept(records / "base.json", lambda: score(out, None, TASKS))
    single = {task: kept(records / f"{task}.json", partial(score, out, out / task, [task]))[task] for task in TASKS}
    found = []
    for name, recipe in RECIPES.items():
        for pair in combinations(TASKS, 2):
            file = records / f"{'-'.join(pair)}-{name}.json"
            if only_finished and not file.exists():
                continue
            record = kept(file, partial(_one, out, pair, recipe))
            merged = record["scores"]
            both = {task: {"base": base[task], "single": single[task], "merge": merged[task]} for task in pair}
            found.append({"pair": pair, "recipe": name, "forecast": record["forecast"], "scores": both})
            print(pair, name, [round(row["retention"], 3) for row in points([found[-1]])], flush=True)
    return found


def _one(out: Path, pair: tuple[str, str], recipe: dict[str, Any]) -> dict[str, Any]:
    from lorakit.lens import compare
    from lorakit.merging import merge as merge_adapters

    paths = [str(out / task) for task in pair]
    methods = [recipe["method"]]
    report = compare(*paths, weights=recipe["weights"], methods=methods, density=recipe.get("density", 0.5))
    assert report.forecast is not None
    with tempfile.TemporaryDirectory() as directory:
        merge_adapters(paths, directory, **recipe)
        scores = score(out, Path(directory), pair)
    return {"forecast": asdict(report.forecast.methods[0]), "cosine": report.total.cosine, "scores": scores}


def points(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task of each merge the forecast and the retention, (merge − base) / (adapter − base) in mean score."""
    found = []
    for number, record in enumerate(records):
        for task, letter in zip(record["pair"], "ab", strict=True):
            scores = {side: fmean(values) for side, values in record["scores"][task].items()}
            gain = scores["single"] - scores["base"]
            found.append(
                {
                    "merge": number,
                    "pair": record["pair"],
                    "recipe": record["recipe"],
                    "task": task,
                    "gain": gain,
                    "retention": (scores["merge"] - scores["base"]) / gain,
                    **{name: record["forecast"][f"{name}_{letter}"] for name in FORECASTS},
                    "weight": RECIPES[record["recipe"]]["weights"]["ab".index(letter)],
                    "uncut": float(RECIPES[record["recipe"]]["method"] == "linear"),
                }
            )
    return found


def rank_correlation(rows: Sequence[dict[str, Any]], name: str, *, digits: int = 4) -> dict[str, Any]:
    """Spearman's correlation of a forecast with the retention, and a 95 % interval from 2,000 resamples of merges.

    Values are rounded to `digits` before they are ranked. None where all forecasts are equal.
    """
    import numpy as np
    from scipy.stats import bootstrap, spearmanr

    merges = sorted({row["merge"] for row in rows})
    x, y = (np.array([row[key] for row in rows]).round(digits) for key in (name, "retention"))
    counts: dict[str, Any] = {"n": len(rows), "merges": len(merges)}
    if np.ptp(x) == 0:
        return {"rho": None, "lower": None, "upper": None, **counts}
    places = [np.array([i for i, row in enumerate(rows) if row["merge"] == merge]) for merge in merges]

    def statistic(sample: Any) -> float:
        chosen = np.concatenate([places[int(i)] for i in sample])
        return float(spearmanr(x[chosen], y[chosen]).statistic) if np.ptp(x[chosen]) else 0.0

    found = bootstrap(
        (np.arange(len(merges)),),
        statistic,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    rho = float(spearmanr(x, y).statistic)
    return {"rho": rho, "lower": float(found.low), "upper": float(found.high), **counts}


def says(found: dict[str, Any]) -> str:
    """What an interval says for a user."""
    if found["lower"] > 0:
        return "ranked retention better than chance"
    if found["upper"] < 0:
        return "ranked retention worse than chance: more of it went with less retention"
    return "is not shown to rank retention at all: the interval includes 0"


def page(out: Path) -> None:
    """docs/evidence/merges.md with its records and figure."""
    records = merge(out, only_finished=True)
    rows = points(records)
    directory = Path(__file__).resolve().parents[1] / "docs" / "evidence"
    (directory / "merges").mkdir(exist_ok=True)
    parts = {
        "all merges": rows,
        **{recipe: [row for row in rows if row["recipe"] == recipe] for recipe in RECIPES},
        "weights that sum to 1, linear": [row for row in rows if row["recipe"] in ("linear-half", "linear-uneven")],
    }
    found = {
        part: {name: rank_correlation(some, name) for name in FORECASTS + BASELINES}
        for part, some in parts.items()
        if len(some) >= 10
    }
    unrounded = rank_correlation(rows, "directions", digits=15)
    summary = {"records": records, "correlations": found, "directions_unrounded": unrounded}
    write_json(directory / "merges" / "records.json", json.dumps(summary))
    _figure(rows, found["all merges"]["strength"]).savefig(directory / "merges" / "forecast.png", dpi=110)
    write_json(directory / "merges.md", _page(rows, found, unrounded))


def _page(
    rows: Sequence[dict[str, Any]], found: dict[str, dict[str, dict[str, Any]]], unrounded: dict[str, Any]
) -> str:
    def cell(one: dict[str, Any]) -> str:
        if one["rho"] is None:
            return "all equal"
        return f"{one['rho']:+.2f} [{one['lower']:+.2f}, {one['upper']:+.2f}]"

    correlations = [
        f"| {part} | {both['strength']['merges']} | "
        + " | ".join(cell(both[name]) for name in ("strength", "weight", "directions"))
        + " |"
        for part, both in found.items()
    ]
    merges = [
        f"| {row['recipe']} | {' + '.join(row['pair'])} | {row['task']} | {row['strength']:.3f} | "
        f"{row['directions']:.3f} | {row['retention']:.0%} |"
        for row in rows
    ]
    gains = {row["task"]: row["gain"] for row in rows}
    strength, directions = (found["all merges"][name] for name in FORECASTS)
    kept = sorted(row["retention"] for row in rows)
    return TEMPLATE.format(
        merges_n=strength["merges"],
        points=strength["n"],
        planned=len(RECIPES) * len(list(combinations(TASKS, 2))),
        strength=cell(strength),
        directions=cell(directions),
        strength_says=says(strength),
        weight=cell(found["all merges"]["weight"]),
        uncut=cell(found["all merges"]["uncut"]),
        unrounded=cell(unrounded),
        recipes=_recipes(found),
        ranges=_ranges(rows),
        lowest=f"{kept[0]:.0%}",
        middle=f"{kept[len(kept) // 2]:.0%}",
        highest=f"{kept[-1]:.0%}",
        gains=", ".join(f"{task} {gain:.3f}" for task, gain in gains.items()),
        rank=RANK,
        steps=STEPS,
        batch=BATCH_SIZE,
        length=LENGTH,
        rate=LEARNING_RATE,
        documents=DOCUMENTS,
        correlations="\n".join(correlations),
        table="\n".join(merges),
    )


def _recipes(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """In which recipes the strength is shown to rank retention."""
    shown = [recipe for recipe in RECIPES if recipe in found and found[recipe]["strength"]["lower"] > 0]
    others = [recipe for recipe in RECIPES if recipe in found and recipe not in shown]
    return f"shown in {', '.join(shown) or 'none'}, and not shown in {', '.join(others) or 'none'}"


def _ranges(rows: Sequence[dict[str, Any]]) -> str:
    """The ranges of retention at low, middle and high strengths."""
    parts = []
    for low, high, text in ((0.0, 0.45, "below 0.45"), (0.45, 0.9, "from 0.45 to 0.9"), (0.9, 99.0, "above 0.9")):
        kept_there = [row["retention"] for row in rows if low <= row["strength"] < high]
        if kept_there:
            parts.append(f"{min(kept_there):.0%} to {max(kept_there):.0%} at strengths {text}")
    return f"Retention was {', '.join(parts)}."


def _figure(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for recipe, marker in zip(RECIPES, "osD^", strict=True):
        some = [row for row in rows if row["recipe"] == recipe]
        axes.scatter([r["strength"] for r in some], [r["retention"] for r in some], label=recipe, marker=marker)
    axes.set_xlabel("forecast: strength of the adapter's update in the merge")
    axes.set_ylabel("measured: share of the adapter's gain kept")
    axes.set_title(f"Spearman {found['rho']:+.2f} [{found['lower']:+.2f}, {found['upper']:+.2f}]")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend()
    return figure


TEMPLATE = """# What a forecast of a merge is worth

Over all {merges_n} merges, the forecast strength of an adapter's update {strength_says} (Spearman {strength}).
The adapter's own weight, which needs no forecast, has {weight}. At one recipe, that strength ranks retention is
{recipes}. The share of an adapter's directions that is left has {directions}; whether the merge is linear or TIES has
{uncut} by itself.

![Forecast strength against measured retention](merges/forecast.png)

Four LoRA adapters of rank {rank} were trained on SmolLM2-135M-Instruct, each in {steps} steps of {batch} short texts
(at most {length} tokens, AdamW, learning rate {rate:g}), one for each task: ARC-Easy, OpenBookQA, CoLA, and Python's
documentation. Of {planned} planned merges (six pairs, four recipes) {merges_n} were made. Before each merge
`lorakit.lens.compare` forecast what is left of both adapters; then merge, single adapters and base model were scored on
{documents} held-out documents of both tasks. Retention is (merge − base) / (adapter − base) in mean loss. It ranged
from {lowest} to {highest}, with {middle} in the middle. Gains of the adapters in nats a token: {gains}.
Such gains in loss include the form of the answers, not only what is right.

## For a user

* Strength is not retention. {ranges}
  Read the forecast as how much of an update is applied, and measure what matters: `tasks` of `lorakit.merging.merge`,
  or `--retain`.
* Much of the spread in strength comes from weights and methods, and so does a correlation over all merges. The rows of
  single recipes below say what the forecast adds at given weights.
* This is one small model, with short trainings and {points} pairs of a merge and a task. Merges that share an adapter
  are not independent, so the true intervals are wider than these.

## Rank correlation with retention

Intervals are at 95 %, from 2,000 bootstrap resamples of whole merges; those from few merges are rough.

| merges | number | strength | weight | directions |
| --- | --- | --- | --- | --- |
{correlations}

`weight` is the adapter's own weight in the merge. An uncut linear merge holds all directions of both adapters, so their
share is 1 in each, but for the last bits. Values are therefore rounded to 4 digits before they are ranked. That was
decided after the results were seen, as were the comparisons with weight and method. Unrounded, the correlation of
directions over all merges is {unrounded}.

## All merges

linear-half: weights ½ and ½. linear-uneven: 0.8 and 0.2. linear-full: 1 and 1. ties: weights ½ and ½, density ½.

| recipe | pair | task | strength | directions | retention |
| --- | --- | --- | --- | --- | --- |
{table}

Written by `benchmarks/merge_forecast.py`; [all scores by document](merges/records.json).
"""


def main() -> None:
    stages: dict[str, Callable[..., Any]] = {
        "train": train,
        "merge": lambda _, out: merge(out),
        "page": lambda _, out: page(out),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stages[options.stage](options.data, options.out)


if __name__ == "__main__":
    main()
