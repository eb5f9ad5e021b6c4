"""The trials of a bench: one training, one cut, or one adapter on one task. Each gets paths and returns JSON."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import set_seed

from lorakit.adapters import open_adapter
from lorakit.adapters.atomic import replaced_directory
from lorakit.adapters.rewritable import stored_bytes
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.compress import truncate
from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions, Task, load_base
from lorakit.evaluation._attach import adapted
from lorakit.evaluation._digests import adapter_digest, base_digest, document_digests
from lorakit.evaluation._evaluate import environment, scored
from lorakit.evaluation._models import load_tokenizer, training_tokenizer
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._settings import TrainSettings
from lorakit.experiments._training import batches_of, train_adapter
from lorakit.naming.patterns import compact_pattern


def read_data(*, base: str, options: LoadOptions, data: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of the training data, and the hash of each example."""
    examples = loader(tokenizer=training_tokenizer(base, options), progress=False, **data)
    documents = [document for batch in examples for document in document_digests(batch)]
    return {"report": examples.report.to_dict(), "documents": documents}


def train(
    *,
    base: str,
    options: LoadOptions,
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    training: Mapping[str, Any],
    seed: int,
    out: str,
    progress: bool,
) -> dict[str, Any]:
    """Train one adapter and write it to `out`, whole or not at all."""
    started = time.perf_counter()
    model, _ = loaded_base(base, options)
    tokenizer = training_tokenizer(base, options)
    examples = loader(tokenizer=tokenizer, progress=False, **data)
    settings = TrainSettings(**training, collate_fn=examples.collate_fn, train=None)
    lora = LoraConfig(**copy.deepcopy(dict(config)))
    name = Path(out).name
    with preserved_rng(model), preserved_state(model), preserved_base(model, lora):
        set_seed(seed % 2**32)
        peft_model = get_peft_model(model, lora)
        parameters = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        with tqdm(total=settings.steps, desc=name, unit="step", disable=not progress, delay=1.0, leave=False) as bar:
            loss = train_adapter(peft_model, batches_of(examples.dataset, settings, seed, bar), settings, seed, name)
        with replaced_directory(out) as directory:
            peft_model.eval().save_pretrained(str(directory))
            tokenizer.save_pretrained(str(directory))
    seconds = time.perf_counter() - started
    return _written(out) | {"parameters": parameters, "train_loss": loss, "seconds": round(seconds, 3)}


def cut(*, adapter: str, sha256: str, ranks: Mapping[str, int], out: str) -> dict[str, Any]:
    """Truncate an adapter to these ranks of its modules, without retraining."""
    check_unchanged(adapter, sha256)
    report = truncate(adapter, out, ranks=compact_pattern(ranks, implied=()), pad=False, overwrite=True)
    return _written(out) | {"parameters": report.parameters, "energy_kept": report.energy_kept}


def score(
    *, base: str, options: LoadOptions, adapter: str | None, sha256: str | None, task: Task, progress: bool
) -> dict[str, Any]:
    """One score a document, of the base model or of an adapter in it."""
    model, weights = loaded_base(base, options)
    tokenizer = load_tokenizer(base, options=options)
    if adapter is not None:
        check_unchanged(adapter, sha256)
    with contextlib.nullcontext(model) if adapter is None else adapted(model, adapter) as one:
        found = scored(one, [task], tokenizer, limit=None, cache=None, weights="", progress=progress)[task.name]
    return {
        "documents": list(found.documents),
        "scores": list(found.scores),
        "settings": dict(found.settings),
        "base_sha256": weights,
        "device": str(model.device),
        "environment": environment(),
    }


@functools.lru_cache(maxsize=1)
def loaded_base(base: str, options: LoadOptions) -> tuple[Any, str]:
    """The base model, which every trial leaves as it was, and the hash of its weights; loaded once a process."""
    model = load_base(base, options)
    return model, base_digest(model)


def check_unchanged(adapter: str | os.PathLike[str], sha256: str | None) -> None:
    """Raise EvaluationError for an adapter that is no longer the one that a trial wrote."""
    if not Path(adapter).is_dir() or adapter_digest(adapter) != sha256:
        raise EvaluationError(
            f"The adapter in {os.fspath(adapter)!r} is not the one that the bench wrote: it was changed or removed "
            f"since. Delete its record to make it again."
        )


def _written(out: str) -> dict[str, Any]:
    return {"sha256": adapter_digest(out), "size_bytes": stored_bytes(open_adapter(out))}
