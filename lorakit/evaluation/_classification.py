"""Tasks whose documents each belong to a class, for models that classify."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lorakit._checks import check_integer, check_number
from lorakit.data._labelled import Inputs, Labelled, inputs_for, labelled
from lorakit.data._sources import is_source
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import data_digest, digest
from lorakit.evaluation._task_kinds import Scored
from lorakit.statistics._corpus_metrics import CORPUS_METRICS

_SHARED: ContextVar[dict[str, Tensor] | None] = ContextVar("_SHARED", default=None)
OPTIONS = ("columns", "num_examples", "shuffle_seed", "start", "split", "subset")
ClassMetric = Literal["acc", "mcc", "f1", "macro_f1", "pearson", "loss"]
_OF_NUMBERS = ("pearson",)


@dataclass(frozen=True)
class ClassificationTask:
    """Whether a model finds the class of each document; see `classification`."""

    name: str
    source: Any
    metric: str
    length: int
    batch_size: int
    margin: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cacheable: bool = field(default=True, init=False)

    def fingerprint(self) -> str:
        """A hash of the data, of how it is cut, and of the metric."""
        options = sorted(map(str, self.options.items()))
        return digest([data_digest(self.source), self.metric, self.length, options])

    def read(self) -> Labelled:
        """The documents. Raises: DataError."""
        return labelled(self.source, **self.options)

    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored:
        """Classify the first documents; of a model of images `tokenizer` is its image processor."""
        if tokenizer is None:
            raise EvaluationError(f"Task {self.name!r} needs the model's tokenizer or processor; pass `tokenizer`.")
        data = self.read()
        if limit is not None:
            first = frozenset(data.documents[:limit])
            data = data.chosen(first.__contains__)
        logits = self._logits(model, data, tokenizer)
        self._check(data, logits)
        settings = {"length": self.length, "metric": self.metric, "copies_left_out": data.num_copies}
        documents, labels = list(data.documents), torch.tensor(data.labels)
        if self.metric == "loss":
            return Scored(documents, (-label_losses(logits, labels)).tolist(), settings)
        predicted = logits[:, 0] if self.metric in _OF_NUMBERS else logits.argmax(1)
        if self.metric in CORPUS_METRICS:
            return Scored(documents, predicted.tolist(), settings, self.metric, labels.double().tolist())
        return Scored(documents, (predicted == labels).double().tolist(), settings)

    def _check(self, data: Labelled, logits: Tensor) -> None:
        """Raise EvaluationError for labels that the metric or the model is not for."""
        numbers = logits.shape[1] == 1
        if numbers != (self.metric in _OF_NUMBERS) and self.metric != "loss":
            what = "predicts a number" if numbers else f"knows {logits.shape[1]} classes"
            raise EvaluationError(f"Task {self.name!r} has the metric {self.metric!r}, and the model {what}.")
        if not numbers and not (data.has_classes and max(data.labels) < logits.shape[1]):
            raise EvaluationError(
                f"Task {self.name!r} has the label {max(data.labels)}, and the model knows {logits.shape[1]} classes, "
                f"from 0. Train it on data with all of them."
            )

    def _logits(self, model: Any, data: Labelled, tokenizer: Any) -> Tensor:
        shared = _SHARED.get()
        shared = {} if shared is None else shared
        key = digest([list(data.documents), self.length])
        if key not in shared:
            shared[key] = class_logits(model, inputs_for(data, tokenizer, self.length), self.batch_size)
        return shared[key]


@contextlib.contextmanager
def shared_logits() -> Iterator[None]:
    """Inside, tasks on the same documents share the logits of the first of them: one model, whose weights are fixed."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def classification(
    path: Any,
    *,
    name: str | None = None,
    metric: ClassMetric = "acc",
    length: int = 512,
    batch_size: int = 32,
    margin: float | None = None,
    **options: Any,
) -> ClassificationTask:
    """Texts or images with a class each, for a model that classifies: 1 where it finds the class, else 0.

    Args:
        path: a file, a `datasets.Dataset` or a dataset id with the columns `text` (and, for pairs, `text_pair`) or
            `image`, and `label`, an integer from 0; or a directory of images with a folder for each class. Labels that
            are no integers are numbers that the model predicts.
        name: the task's name; None: the file's, with the metric where that is not "acc".
        metric: "acc"; "loss", a document's negative cross-entropy in nats; "mcc" (Matthews' correlation), "f1" (of
            class 1 of two) and "macro_f1" are of the whole corpus. Of predicted numbers "pearson", their correlation
            with the labels, or "loss", a document's negative squared error.
        length: the longest text in tokens.
        batch_size: documents a batch.
        margin: the task's own margin; None: that of the call.
        options: `columns`, such as ``{"text": "sentence", "label": "label"}``, `num_examples`, `start`, `shuffle_seed`,
            `split` and `subset`, as in `lorakit.data.loader`.

    A document that is there again counts once. Raises: ValueError for an unknown metric; TypeError for what is no
    source or no option.
    """
    if metric not in get_args(ClassMetric):
        raise ValueError(f"`metric` must be one of {', '.join(get_args(ClassMetric))}; got {metric!r}.")
    if not is_source(path):
        raise TypeError(f"`path` must be a path, a dataset id or a Dataset; got {type(path).__name__}.")
    check_integer("length", length)
    check_integer("batch_size", batch_size)
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise TypeError(f"`{unknown[0]}` is no option of a classification; known are {', '.join(OPTIONS)}.")
    stem = Path(path).stem if isinstance(path, str | os.PathLike) else "classification"
    title = name or (stem if metric == "acc" else f"{stem} {metric}")
    own = None if margin is None else check_number("margin", margin, above=0)
    source = os.fspath(path) if isinstance(path, os.PathLike) else path
    return ClassificationTask(title, source, metric, length, batch_size, own, dict(options))


@torch.no_grad()
def class_logits(model: Any, inputs: Inputs, batch_size: int) -> Tensor:
    """The logits (n, classes) of the documents in their order, float32 on the CPU.

    Documents of similar length share a batch, so that little is padded.
    """
    order = sorted(range(len(inputs.examples)), key=lambda i: _size(inputs.examples[i]))
    found = torch.cat([model(**batch).logits.float().cpu() for batch in _batches(inputs, order, batch_size, model)])
    return found[torch.tensor(order).argsort()]


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy (n,) of each document in nats, or the squared error of a number; float64."""
    if logits.shape[1] == 1:
        return (logits[:, 0].double() - labels.double()) ** 2
    return F.cross_entropy(logits.double(), labels, reduction="none")


def _batches(inputs: Inputs, order: list[int], batch_size: int, model: Any) -> Iterator[dict[str, Tensor]]:
    loader: Any = DataLoader(inputs.examples, batch_size, sampler=order, collate_fn=inputs.collate_fn)  # type: ignore[arg-type]
    for batch in loader:
        moved = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
        yield {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in moved.items()}


def _size(example: Any) -> int:
    return len(example["input_ids"]) if "input_ids" in example else 0
