"""Tasks: each gives one score a document, higher is better."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lorakit._checks import check_number
from lorakit.errors import EvaluationError
from lorakit.evaluation._task_kinds import FunctionTask, HarnessTask, LossTask, Task
from lorakit.statistics._corpus_metrics import CORPUS_METRICS, corpus_metric

ChoiceMetric = Literal["acc", "acc_norm", "mcc", "f1", "macro_f1"]


def choices(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    prompt: str = "Question: {{question}}\nAnswer:",
    question: str = "question",
    options: str = "choices",
    answer: str = "answer",
    metric: ChoiceMetric = "acc",
    limit: int | None = None,
    margin: float | None = None,
) -> HarnessTask:
    """Multiple choice from a .jsonl, .json, .csv or .parquet file: 1 where the right choice is the likeliest, else 0.

    It runs on lm-evaluation-harness (extra `eval`): the choice whose tokens have the largest summed log-probability
    after the prompt is the model's.

    Args:
        path: a file of documents with a question, a list of choices, and the index of the right one.
        name: the task's name; None: the file's.
        prompt: a Jinja template over a document's fields.
        question, options, answer: the fields' names.
        metric: "acc"; "acc_norm" divides each log-probability by the choice's length in bytes; "mcc" (Matthews'
            correlation), "f1" (of choice 1 of two) and "macro_f1" are of the whole corpus, not of a document.
        limit: how many documents at most.
        margin: the task's own margin; None: that of `certify`.
    Raises: EvaluationError for a file that is not there or of another kind; ValueError for an unknown metric.
    """
    if metric not in get_args(ChoiceMetric):
        raise ValueError(f"`metric` must be one of {', '.join(get_args(ChoiceMetric))}; got {metric!r}.")
    corpus = metric if metric in CORPUS_METRICS else None
    file = _data_file(path)
    title = name or file.stem
    config = {
        **_file_config(title, file),
        "output_type": "multiple_choice",
        "doc_to_text": prompt.replace("{{question}}", "{{" + question + "}}"),
        "doc_to_choice": "{{" + options + "}}",
        "doc_to_target": answer,
        "metric_list": [
            *({"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")),
            # for its pairs of true and predicted class
            *([] if corpus is None else [{"metric": "mcc", "higher_is_better": True}]),
        ],
    }
    own = metric if corpus is None else "mcc"
    return HarnessTask(title, config, own, os.fspath(file), limit, margin=_margin(margin), corpus_metric=corpus)


def exact_match(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    prompt: str = "{{question}}",
    answer: str = "answer",
    until: Sequence[str] = ("\n",),
    max_tokens: int = 64,
    limit: int | None = None,
    margin: float | None = None,
) -> HarnessTask:
    """Greedy generation from a file of documents: 1 where what is generated is the answer, else 0.

    Case, punctuation and surrounding space do not count. It runs on lm-evaluation-harness (extra `eval`).

    Args:
        path, name, limit, margin: as in `choices`.
        prompt: a Jinja template over a document's fields.
        answer: the field that holds the right text.
        until: where generation stops.
        max_tokens: how many tokens are generated at most.
    Raises: EvaluationError for a file that is not there or of another kind.
    """
    file = _data_file(path)
    title = name or file.stem
    config = {
        **_file_config(title, file),
        "output_type": "generate_until",
        "doc_to_text": prompt,
        "doc_to_target": "{{" + answer + "}}",
        "generation_kwargs": {"until": list(until), "max_gen_toks": max_tokens, "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
    }
    return HarnessTask(title, config, "exact_match", os.fspath(file), limit, margin=_margin(margin))


def loss(
    source: Any,
    *,
    name: str | None = None,
    length: int = 512,
    batch_size: int = 8,
    num_examples: int | None = None,
    margin: float | None = None,
    **options: Any,
) -> LossTask:
    """Held-out loss: a document's score is the negative mean loss of its labelled tokens, in nats a token.

    Args:
        source: a path, a `datasets.Dataset`, or a list of batches with `labels`; see `lorakit.data.loader`.
        name: the task's name; None: the file's, or "loss".
        length: the longest document in tokens.
        batch_size: documents a batch. Padding is masked: in float32 a document's loss depends on it by less than 1e-4.
        num_examples: how many documents at most.
        margin: the task's own margin in nats; None: that of `certify`.
        options: more of `lorakit.data.loader`, such as `columns` and `split`; for a path or Dataset.
    Raises: TypeError for `options` with batches.
    """
    path = isinstance(source, str | os.PathLike)
    title = name or (Path(source).stem if path else "loss")
    if not path and not hasattr(source, "column_names"):
        if options:
            raise TypeError(f"{', '.join(f'`{o}`' for o in options)} cannot be applied to batches, only to a source.")
        source = list(source)
    return LossTask(title, source, length, batch_size, num_examples, _margin(margin), dict(options))


def lm_eval(
    task: str | os.PathLike[str],
    *,
    metric: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    margin: float | None = None,
) -> HarnessTask:
    """A task of lm-evaluation-harness (extra `eval`), by its name or the path of its YAML config.

    Args:
        task: such as "arc_easy"; a task that the harness has to download needs the Hub.
        metric: the metric that is the score; None: the first that each document has. Where the harness gives classes
            for it ("mcc", and "f1" of two classes), it is a corpus metric.
        limit, num_fewshot, chat_template: as in the harness.
        margin: the task's own margin; None: that of `certify`.
    """
    name = os.fspath(task)
    return HarnessTask(Path(name).stem, name, metric, None, limit, num_fewshot, chat_template, _margin(margin))


def function(
    f: Callable[[Any], Any], *, name: str | None = None, metric: str | None = None, margin: float | None = None
) -> FunctionTask:
    """A function of the model: ``f(model)`` returns the documents' scores in a fixed order, higher is better.

    With a corpus metric ("mcc", "f1" or "macro_f1") it returns ``(labels, predictions)``, both classes as numbers.
    Results are never kept for later calls.
    """
    if not callable(f):
        raise TypeError(f"`f` must be a function of the model; got {type(f).__name__}.")
    if metric is not None:
        corpus_metric(metric)
    return FunctionTask(name or str(getattr(f, "__name__", "function")), f, _margin(margin), metric)


def task_of(value: Any) -> Task:
    """A task as a shell or a call names it: a task, a path (`choices` where it has choices, else `loss`), or a name.

    Raises: EvaluationError, TypeError.
    """
    if all(hasattr(value, name) for name in ("name", "score", "fingerprint")):
        task: Task = value
        return task
    if callable(value):
        return function(value)
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"A task must be a task, a function, a path or a name; got {type(value).__name__}.")
    path = Path(value)
    if path.suffix in (".yaml", ".yml") or not path.exists():
        return lm_eval(value)
    if path.suffix == ".txt":
        return loss(path)
    return choices(path) if _has_choices(path) else loss(path)


def _margin(margin: float | None) -> float | None:
    return None if margin is None else check_number("margin", margin, above=0)


_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _data_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix not in _READERS:
        raise EvaluationError(f"A task's file must end in {', '.join(_READERS)}; got {os.fspath(path)!r}.")
    if not file.is_file():
        raise EvaluationError(f"The task's file {os.fspath(path)!r} is not there.")
    return file.resolve()


def _file_config(name: str, file: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": _READERS[file.suffix],
        "dataset_kwargs": {"data_files": {"test": os.fspath(file)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }


def _has_choices(path: Path) -> bool:
    from datasets import load_dataset

    if path.suffix not in _READERS:
        return False
    rows = load_dataset(_READERS[path.suffix], data_files=os.fspath(path), split="train[:1]")
    return {"question", "choices", "answer"} <= set(rows.column_names)
