"""The kinds of tasks: on lm-evaluation-harness, held-out loss, and functions of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.data import ExampleLoader, loader
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import data_digest, digest, document_digests, document_hashes, file_digest
from lorakit.evaluation._harness import run_task


@dataclass(frozen=True)
class Scored:
    """Documents' hashes, their scores, and settings that two sides of a comparison must share.

    With a corpus metric (`metric`) `scores` are predicted classes, and `labels` the true ones.
    """

    documents: list[str]
    scores: list[float]
    settings: dict[str, Any]
    metric: str | None = None
    labels: list[float] | None = None


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
    corpus_metric: str | None = None  # computed from classes that the harness gives under `metric`

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
        metric = [self.metric, self.corpus_metric]
        return digest([config, metric, data, self.limit, self.num_fewshot, self.chat_template])

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
            progress=progress,
        )
        metric = self.corpus_metric or found.metric
        return Scored(found.documents, found.scores, found.settings, metric, found.labels)


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
        batches = self._batches(tokenizer, min(limits) if limits else None, progress)
        documents: list[str] = []
        scores: list[float] = []
        for document, loss in document_losses(model, batches):
            if limits and len(documents) >= min(limits):
                break
            documents.append(document)
            scores.append(-loss)
        return Scored(documents, scores, {"length": self.length, "loss": "mean over labelled tokens"})

    def documents(self, tokenizer: Any) -> list[str]:
        """The hashes of the documents, without scores."""
        return document_hashes(self._batches(tokenizer, self.num_examples, False))[: self.num_examples]

    def _batches(self, tokenizer: Any, num_examples: int | None, progress: bool) -> Any:
        if not isinstance(self.source, str | os.PathLike) and not hasattr(self.source, "column_names"):
            return self.source
        if tokenizer is None:
            raise EvaluationError(f"Task {self.name!r} needs the model's tokenizer; pass `tokenizer`.")
        return loader(
            self.source,
            tokenizer,
            length=self.length,
            batch_size=self.batch_size,
            num_examples=num_examples,
            progress=progress,
            **self.options,
        )


@dataclass(frozen=True)
class FunctionTask:
    """A function of the model that returns the documents' scores, or with a corpus metric labels and predictions."""

    name: str
    function: Callable[[Any], Any]
    margin: float | None = None
    metric: str | None = None
    cacheable: bool = field(default=False, init=False)

    def fingerprint(self) -> str:
        """The function's name, or its class's: what it does is not known."""
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return digest([self.name, self.metric, named.__qualname__])

    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored:
        """Call the function, without gradients; the documents are numbered."""
        with torch.no_grad():
            values = self.function(model)
        labels = None
        if self.metric is not None:
            if not isinstance(values, tuple) or len(values) != 2:
                raise EvaluationError(
                    f"Task {self.name!r} must return (labels, predictions) for the metric {self.metric!r}; got "
                    f"{type(values).__name__}."
                )
            labels, values = self._numbers(values[0])[:limit], values[1]
        scores = self._numbers(values)[:limit]
        documents = [digest([self.name, i]) for i in range(len(scores))]
        return Scored(documents, scores, {"function": self.name}, self.metric, labels)

    def _numbers(self, values: Any) -> list[float]:
        try:
            numbers: list[float] = torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"Task {self.name!r} must return one number a document, a sequence of numbers; got "
                f"{type(values).__name__}."
            ) from error
        return numbers


def document_losses(model: Any, batches: Any) -> Iterable[tuple[str, float]]:
    """Each document's hash and mean loss, over its labelled tokens; documents without one are left out.

    What `lorakit.data.loader` reads runs in order of length, and comes in the order of the source.
    """
    if not isinstance(batches, ExampleLoader):
        return _losses_of(model, batches)
    grouped, places = batches.by_length()
    found = dict(zip(places, _losses_of(model, grouped), strict=True))  # no example is without a label
    return [found[i] for i in range(len(places))]


@torch.no_grad()
def _losses_of(model: Any, batches: Any) -> Iterator[tuple[str, float]]:
    device = model.get_input_embeddings().weight.device
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits
        targets = batch["labels"][:, 1:].to(logits.device)
        for i, document in enumerate(document_digests(batch)):
            labelled = targets[i] != IGNORED_LABEL
            if labelled.any():
                yield document, float(F.cross_entropy(logits[i, :-1][labelled].float(), targets[i][labelled]))
