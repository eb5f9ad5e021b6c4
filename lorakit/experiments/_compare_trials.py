"""The trials of a comparison of methods: what the data are, and one training with its scores."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from lorakit.adapters.atomic import replaced_directory
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.evaluation import LoadOptions, Task
from lorakit.evaluation._classification import shared_logits
from lorakit.evaluation._digests import digest
from lorakit.evaluation._evaluate import environment, scored
from lorakit.experiments._compare_kinds import KINDS, inputs_of, loaded, split, with_head
from lorakit.experiments._methods import check_model, removed_parameters
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._settings import TrainSettings
from lorakit.experiments._training import batches_of, train_adapter


def read_data(
    *,
    kind: str,
    base: str,
    options: LoadOptions,
    data: Mapping[str, Any],
    tasks: Sequence[Task],
    validation: int | None,
) -> dict[str, Any]:
    """What is trained on: the number of documents and classes, and which documents are left out.

    Documents of a task are left out, as far as the two can be compared. `validation` None: a tenth of the rest.
    """
    one = KINDS[kind]
    processor = one.processor(base, options)
    found = one.read(data, processor)
    trained, overlap, unchecked = set(found.documents), {}, []
    for task in tasks:
        tested = one.tested(task, processor)
        if tested is None:
            unchecked.append(task.name)
            continue
        overlap[task.name] = sorted(trained.intersection(tested))
    left_out = sorted({document for documents in overlap.values() for document in documents})
    size = (len(trained) - len(left_out)) // 10 if validation is None else validation
    kept, held = split(found.documents, left_out, size)
    return {
        "documents": sum(document in kept for document in found.documents),
        "validation": size,
        "copies": found.num_copies,
        "overlap": {name: len(documents) for name, documents in overlap.items()},
        "unchecked": unchecked,
        "left_out": left_out,
        "num_labels": found.num_labels,
        "trained_sha256": digest([document for document in found.documents if document in kept]),
        "validation_sha256": digest(sorted(held)),
    }


def train_and_score(
    *,
    base: str,
    options: LoadOptions,
    data: Mapping[str, Any],
    config: PeftConfig,
    training: Mapping[str, Any],
    seed: int,
    tasks: Sequence[Task],
    out: str | None,
) -> dict[str, Any]:
    """Train one adapter; its loss on the validation split, and its scores. Write it to `out` if given.

    `data` is {"kind", "train", "left_out", "validation", "num_labels", "progress"}.
    """
    started = time.perf_counter()
    kind = data["kind"]
    found = loaded(kind, base, options, data["num_labels"], seed if data["num_labels"] else 0)
    train, held = inputs_of(kind, base, options, json.dumps(data["train"]), tuple(data["left_out"]), data["validation"])
    settings = TrainSettings(**training, collate_fn=train.collate_fn, train=None)
    model, name = found.model, f"seed {seed}" if out is None else Path(out).name
    config = with_head(config, found.head)
    check_model(config, model)
    with preserved_rng(model), preserved_state(model), preserved_base(model, config):
        set_seed(seed % 2**32)
        adapted = get_peft_model(model, copy.deepcopy(config))
        head = head_parameters(adapted)
        parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad) - head
        bar = tqdm(total=settings.steps, desc=name, unit="step", disable=not data["progress"], delay=1.0, leave=False)
        with bar:
            loss = train_adapter(adapted, batches_of(train.examples, settings, seed, bar), settings, seed, name)
        trained = time.perf_counter()
        adapted.eval()
        parameters -= sum(removed_parameters(adapted, used) for used in adapted.peft_config.values())
        losses = None if held is None else KINDS[kind].losses(adapted, held)
        processor = KINDS[kind].processor(base, options)
        with shared_logits():
            scores = scored(adapted, tasks, processor, limit=None, cache=None, weights="", progress=False)
        if out is not None:
            with replaced_directory(out) as directory:
                adapted.save_pretrained(str(directory))
    return {
        "parameters": parameters,
        "head_parameters": head,
        "train_loss": loss,
        "validation_loss": None if losses is None else sum(losses) / len(losses),
        "scores": {
            name: {
                "documents": list(one.documents),
                "scores": list(one.scores),
                "labels": None if one.labels is None else list(one.labels),
                "metric": one.metric,
                "settings": dict(one.settings),
            }
            for name, one in scores.items()
        },
        "base_sha256": found.sha256,
        "device": str(model.device),
        "environment": environment(),
        "train_seconds": round(trained - started, 3),
        "seconds": round(time.perf_counter() - started, 3),
    }


def head_parameters(model: nn.Module) -> int:
    """Trainable parameters of modules that are trained in full."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return sum(p.numel() for wrapper in wrappers for p in wrapper.parameters() if p.requires_grad)
