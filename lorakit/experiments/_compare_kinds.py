"""Kinds of models that methods are compared on: how each reads its data, is loaded, and has a loss."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from transformers import AutoImageProcessor, set_seed

from lorakit.data import loader
from lorakit.data._labelled import Inputs, Labelled, inputs_for, labelled
from lorakit.errors import EvaluationError, raised_as
from lorakit.evaluation import LoadOptions, load_base
from lorakit.evaluation._classification import ClassificationTask, class_logits, label_losses
from lorakit.evaluation._digests import base_digest, document_digests, weights_digest
from lorakit.evaluation._models import load_classifier, training_tokenizer
from lorakit.evaluation._task_kinds import LossTask, document_losses

ModelKind = Literal["causal_lm", "sequence_classification", "image_classification"]
_HEADS = ("classifier", "score", "head", "fc")
_SCORED_AT_ONCE = 32


@dataclass(frozen=True)
class Loaded:
    """A base model, the modules of it that are new and must be trained (its head), and the hash of its weights.

    The hash is without the head, which differs from seed to seed.
    """

    model: Any
    head: tuple[str, ...]
    sha256: str


class Documents(Protocol):
    """Training documents by the hash of their content, before they are split."""

    @property
    def documents(self) -> tuple[str, ...]: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def num_labels(self) -> int | None: ...
    def inputs(self, keep: Callable[[str], bool]) -> Inputs: ...


class Kind(Protocol):
    """One kind of model."""

    @property
    def task_type(self) -> str | None: ...
    @property
    def data_options(self) -> tuple[str, ...]: ...  # of the training data
    def load(self, base: str, options: LoadOptions, num_labels: int | None, seed: int) -> Loaded: ...
    def processor(self, base: str, options: LoadOptions) -> Any: ...
    def read(self, data: Mapping[str, Any], processor: Any) -> Documents: ...
    def tested(self, task: Any, processor: Any) -> Sequence[str] | None: ...
    def losses(self, model: Any, inputs: Inputs) -> list[float]: ...


@dataclass(frozen=True)
class _Texts:
    """Texts to continue."""

    examples: tuple[Any, ...]
    documents: tuple[str, ...]
    collate_fn: Callable[[list[Any]], Any]
    num_copies = 0
    num_labels = None

    def inputs(self, keep: Callable[[str], bool]) -> Inputs:
        pairs = zip(self.documents, self.examples, strict=True)
        return Inputs([example for document, example in pairs if keep(document)], self.collate_fn)


class CausalLM:
    """Texts, prompts and completions, or messages, as `lorakit.data.loader` reads them."""

    task_type = "CAUSAL_LM"
    data_options = tuple(
        name for name in inspect.signature(loader).parameters if name not in ("tokenizer", "progress", "batch_size")
    )

    def load(self, base: str, options: LoadOptions, num_labels: int | None, seed: int) -> Loaded:
        """The model, which has no head to train."""
        model = load_base(base, options)
        return Loaded(model, (), base_digest(model))

    def processor(self, base: str, options: LoadOptions) -> Any:
        """The tokenizer."""
        return training_tokenizer(base, options)

    def read(self, data: Mapping[str, Any], processor: Any) -> Documents:
        """Raises: as `lorakit.data.loader`."""
        found = loader(tokenizer=processor, progress=False, **data)
        examples: tuple[Any, ...] = tuple(found.dataset)  # type: ignore[arg-type]
        documents = [document_digests({name: value[None] for name, value in one.items()})[0] for one in examples]
        return _Texts(examples, tuple(documents), found.collate_fn)

    def tested(self, task: Any, processor: Any) -> Sequence[str] | None:
        """The documents of a held-out loss; those of other tasks are in another form."""
        return task.documents(processor) if isinstance(task, LossTask) else None

    def losses(self, model: Any, inputs: Inputs) -> list[float]:
        """The mean loss of each document's labelled tokens."""
        batches = (inputs.collate_fn([inputs.examples[i]]) for i in range(len(inputs.examples)))
        return [loss for _, loss in document_losses(model, batches)]


@dataclass(frozen=True)
class _LabelledDocuments:
    """Texts or images with labels."""

    rows: Labelled
    processor: Any
    length: int

    @property
    def documents(self) -> tuple[str, ...]:
        return self.rows.documents

    @property
    def num_copies(self) -> int:
        return self.rows.num_copies

    @property
    def num_labels(self) -> int:
        return self.rows.num_labels

    def inputs(self, keep: Callable[[str], bool]) -> Inputs:
        return inputs_for(self.rows.chosen(keep), self.processor, self.length)


class SequenceClassifier:
    """Texts or pairs of texts with classes, or with a number."""

    task_type: str | None = "SEQ_CLS"
    data_options = (*inspect.signature(labelled).parameters, "length")

    def load(self, base: str, options: LoadOptions, num_labels: int | None, seed: int) -> Loaded:
        """The model with a head that depends on the seed alone."""
        return _with_new_head(base, options, "SEQ_CLS", num_labels or 2, seed)

    def processor(self, base: str, options: LoadOptions) -> Any:
        """The tokenizer."""
        return training_tokenizer(base, options)

    def read(self, data: Mapping[str, Any], processor: Any) -> Documents:
        """Raises: DataError."""
        given = dict(data)
        length = given.pop("length", 512)
        return _LabelledDocuments(labelled(**given), processor, length)

    def tested(self, task: Any, processor: Any) -> Sequence[str] | None:
        """The documents of a classification."""
        return task.read().documents if isinstance(task, ClassificationTask) else None

    def losses(self, model: Any, inputs: Inputs) -> list[float]:
        """The loss of each document."""
        labels = torch.tensor([inputs.examples[i]["labels"] for i in range(len(inputs.examples))])
        found: list[float] = label_losses(class_logits(model, inputs, _SCORED_AT_ONCE), labels).tolist()
        return found


class ImageClassifier(SequenceClassifier):
    """Images with classes. PEFT has no task type for them, so that their head is named in `modules_to_save`."""

    task_type = None
    data_options = tuple(inspect.signature(labelled).parameters)

    def load(self, base: str, options: LoadOptions, num_labels: int | None, seed: int) -> Loaded:
        """The model with a head that depends on the seed alone; one that fits already is trained from what it is."""
        found = _with_new_head(base, options, "IMAGE_CLS", num_labels or 2, seed)
        named = [name for name, _ in found.model.named_children() if name in _HEADS]
        return replace(found, head=found.head or tuple(named))

    def processor(self, base: str, options: LoadOptions) -> Any:
        """The image processor. Raises: EvaluationError where there is none."""
        with raised_as(EvaluationError, f"The base model {base!r} has no image processor that can be loaded"):
            return AutoImageProcessor.from_pretrained(
                base, revision=options.revision, trust_remote_code=options.trust_remote_code
            )


KINDS: dict[str, Kind] = {
    "causal_lm": CausalLM(),
    "sequence_classification": SequenceClassifier(),
    "image_classification": ImageClassifier(),
}


@functools.lru_cache(maxsize=1)
def loaded(kind: str, base: str, options: LoadOptions, num_labels: int | None, seed: int) -> Loaded:
    """A base model, which every trial leaves as it was; loaded once for the trials of a seed in a row."""
    return KINDS[kind].load(base, options, num_labels, seed)


@functools.lru_cache(maxsize=2)
def inputs_of(
    kind: str, base: str, options: LoadOptions, data: str, left_out: tuple[str, ...], validation: int
) -> tuple[Inputs, Inputs | None]:
    """What is trained on and what the validation loss is of; `data` as JSON. See `split`."""
    one = KINDS[kind]
    found = one.read(json.loads(data), one.processor(base, options))
    trained, held = split(found.documents, left_out, validation)
    return found.inputs(trained.__contains__), found.inputs(held.__contains__) if validation else None


def split(documents: Sequence[str], left_out: Iterable[str], validation: int) -> tuple[frozenset[str], frozenset[str]]:
    """The documents to train on, and those of the validation split: the `validation` smallest hashes.

    So a document's side depends neither on the order of the rows nor on a seed. Raises: EvaluationError where too few
    are left to train on.
    """
    kept = set(documents).difference(left_out)
    if len(kept) <= validation:
        raise EvaluationError(f"`validation` must leave documents to train on; got {validation} of {len(kept)}.")
    held = frozenset(sorted(kept)[:validation])
    return frozenset(kept) - held, held


def _with_new_head(base: str, options: LoadOptions, task_type: str, num_labels: int, seed: int) -> Loaded:
    set_seed(seed % 2**32)
    model, new = load_classifier(base, options, task_type=task_type, num_labels=num_labels)
    known = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in new}
    return Loaded(model, new, weights_digest(known))


def with_head(config: Any, head: Sequence[str]) -> Any:
    """A copy of a config that also trains these modules in full, where the method can."""
    config = copy.deepcopy(config)
    if head and hasattr(config, "modules_to_save"):
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *head})
    return config
