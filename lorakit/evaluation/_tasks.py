"""Tasks: each gives one score a document, higher is better."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit._checks import check_number
from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import data_digest, digest, document_digests, file_digest
from lorakit.evaluation._harness import run_task


@dataclass(frozen=True)
class Scored:
    """Documents' hashes, their scores, and settings that two sides of a comparison must share."""

    documents: list[str]
    scores: list[float]
    settings: dict[str, Any]


class Task(Protocol):
    """What `evaluate` and `certify` need of a task.

    `margin` is the task's own, in the units of its score; None: that of the call. A task that is not `cacheable` is
    run again in every call. `fingerprint()` is a hash of its data and settings.
    """

    @property
    def name(self) -> str: ...
    @property
    def margin(self) -> float | None: ...
    @property
    def cacheable(self) -> bool: ...
    def fingerprint(self) -> str: ...
    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored: ...


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness: by name, by a YAML config's path, or by a config."""

    name: str
    config: str | dict[str, Any]
    metric: str | None = None
    data: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    margin: float | None = None

    @property
    def cacheable(self) -> bool:
        """Not with a YAML config: which files it reads is not known."""
        return not (isinstance(self.config, str) and Path(self.config).is_file())

    def fingerprint(self) -> str:
        """A hash of the config and of the data it reads."""
        config = self.config
        if isinstance(config, str) and Path(config).is_file():
            config = Path(config).read_text(encoding="utf-8")
        data = None if self.data is None else file_digest(self.data)
        return digest([config, self.metric, data, self.limit, self.num_fewshot, self.chat_template])

    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored:
        """Run the harness on the first documents."""
        limits = [number for number in (self.limit, limit) if number is not None]
        if tokenizer is None:
            raise EvaluationError(f"Task {self.name!r} needs the model's tokenizer; pass `tokenizer`.")
        found = run_task(
            self.config,
            self.metric,
            model,
            tokenizer,
            limit=min(limits) if limits else None,
            num_fewshot=self.num_fewshot,
            chat_template=self.chat_template,
        )
        return Scored(found.documents, found.scores, found.settings)


@dataclass(frozen=True)
class LossTask:
    """The negative mean loss of each document's labelled tokens, in nats a token."""

    name: str
    source: Any
    length: int
    batch_size: int
    num_examples: int | None
    margin: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cacheable: bool = field(default=True, init=False)

    def fingerprint(self) -> str:
        """A hash of the data and of how it is cut."""
        options = sorted(map(str, self.options.items()))
        return digest([data_digest(self.source), self.length, self.num_examples, options])

    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored:
        """Losses of the first documents, each over its own tokens."""

        limits = [number for number in (self.num_examples, limit) if number is not None]
        batches: Any = self.source
        if isinstance(self.source, str | os.PathLike) or hasattr(self.source, "column_names"):
            if tokenizer is None:
                raise EvaluationError(f"Task {self.name!r} needs the model's tokenizer; pass `tokenizer`.")
            batches = loader(
                self.source,
                tokenizer,
                length=self.length,
                batch_size=self.batch_size,
                num_examples=min(limits) if limits else None,
                progress=progress,
                **self.options,
            )
        documents: list[str] = []
        scores: list[float] = []
        for document, loss in _losses(model, batches):
            if limits and len(documents) >= min(limits):
                break
            documents.append(document)
            scores.append(-loss)
        return Scored(documents, scores, {"length": self.length, "loss": "mean over labelled tokens"})


@dataclass(frozen=True)
class FunctionTask:
    """A function of the model that returns the documents' scores."""

    name: str
    function: Callable[[Any], Sequence[float] | Tensor]
    margin: float | None = None
    cacheable: bool = field(default=False, init=False)

    def fingerprint(self) -> str:
        """The function's name: what it does is not known."""
        return digest([self.name, getattr(self.function, "__qualname__", repr(self.function))])

    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored:
        """Call the function, without gradients; the documents are numbered."""
        with torch.no_grad():
            values = self.function(model)
        try:
            scores = torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"Task {self.name!r} must return one score a document, a sequence of numbers; got "
                f"{type(values).__name__}."
            ) from error
        documents = [digest([self.name, i]) for i in range(len(scores))]
        return Scored(documents, scores, {"function": self.name})


def choices(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    prompt: str = "Question: {{question}}\nAnswer:",
    question: str = "question",
    options: str = "choices",
    answer: str = "answer",
    normalized: bool = False,
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
        normalized: divide each log-probability by the choice's length in bytes ("acc_norm").
        limit: how many documents at most.
        margin: the task's own margin; None: that of `certify`.
    Raises: EvaluationError for a file that is not there or of another kind.
    """
    file = _data_file(path)
    title = name or file.stem
    config = {
        **_file_config(title, file),
        "output_type": "multiple_choice",
        "doc_to_text": prompt.replace("{{question}}", "{{" + question + "}}"),
        "doc_to_choice": "{{" + options + "}}",
        "doc_to_target": answer,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    metric = "acc_norm" if normalized else "acc"
    return HarnessTask(title, config, metric, os.fspath(file), limit, margin=_margin(margin))


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
        metric: the metric that is the score; None: the first that each document has.
        limit, num_fewshot, chat_template: as in the harness.
        margin: the task's own margin; None: that of `certify`.
    """
    name = os.fspath(task)
    return HarnessTask(Path(name).stem, name, metric, None, limit, num_fewshot, chat_template, _margin(margin))


def function(
    f: Callable[[Any], Sequence[float] | Tensor], *, name: str | None = None, margin: float | None = None
) -> FunctionTask:
    """A function of the model: ``f(model)`` returns the documents' scores in a fixed order, higher is better."""
    if not callable(f):
        raise TypeError(f"`f` must be a function of the model; got {type(f).__name__}.")
    return FunctionTask(name or str(getattr(f, "__name__", "function")), f, _margin(margin))


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


@torch.no_grad()
def _losses(model: Any, batches: Any) -> Iterator[tuple[str, float]]:
    """Each document's hash and mean loss, over its labelled tokens; documents without one are left out."""
    device = model.get_input_embeddings().weight.device
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits
        targets = batch["labels"][:, 1:].to(logits.device)
        for i, document in enumerate(document_digests(batch)):
            labelled = targets[i] != IGNORED_LABEL
            if labelled.any():
                yield document, float(F.cross_entropy(logits[i, :-1][labelled].float(), targets[i][labelled]))
