"""Scores of models on tasks, kept by the hash of what they depend on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from lorakit._checks import check_integer
from lorakit._files import write_file
from lorakit.calibration.state import in_eval_mode
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import digest, tokenizer_digest, weights_digest
from lorakit.evaluation._models import label_of, load_tokenizer
from lorakit.evaluation._scores import Scores, read_scores, scores_of
from lorakit.evaluation._task_kinds import Task
from lorakit.evaluation._tasks import task_of


def evaluate(
    model: Any,
    tasks: Any,
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Scores]:
    """One score a document of each task, by the task's name.

    Args:
        model: a causal language model, with an adapter or without.
        tasks: a task or several: what `choices`, `exact_match`, `loss`, `lm_eval`, `function` and
            `agreement_task` make, or paths.
        tokenizer: None: that of the model's own path.
        limit: how many documents of each task at most.
        cache: a directory for results, each kept by the hash of weights, task, settings and data; None: none are kept.
        progress: show progress bars on stderr.
    Raises: EvaluationError for tasks that cannot be run, scores that are not finite, and documents that are there
        twice.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size))
        >>> from lorakit.evaluation import loss
        >>> ids = torch.arange(32).view(8, 4)
        >>> scores = evaluate(model, loss([{"input_ids": ids, "labels": ids}]), progress=False)
        >>> len(scores["loss"].scores)
        8
    """
    wanted = tasks_of(tasks)
    tokenizer = load_tokenizer(getattr(model, "name_or_path", None)) if tokenizer is None else tokenizer
    weights = "" if cache is None else model_digest(model)
    return scored(model, wanted, tokenizer, limit=limit, cache=cache, weights=weights, progress=progress)


def scored(
    model: Any,
    tasks: Sequence[Task],
    tokenizer: Any,
    *,
    limit: int | None,
    cache: str | os.PathLike[str] | None,
    weights: str,
    progress: bool,
) -> dict[str, Scores]:
    """`evaluate`, with the hash of the model's weights, which is needed with a cache."""
    if limit is not None:
        check_integer("limit", limit)
    depends = None
    if cache is not None:
        depends = [weights, limit, dtype_of(model), model.device.type, tokenizer_digest(tokenizer), environment()]
    found = {}
    for task in tasks:
        key = digest([depends, task.name, task.fingerprint()]) if depends is not None and task.cacheable else None
        kept = None if key is None or cache is None else _read(Path(cache), key)
        if kept is None:
            with in_eval_mode(model):
                result = task.score(model, tokenizer, limit=limit, progress=progress)
            settings = {**result.settings, "dtype": dtype_of(model)}
            kept = scores_of(
                task.name,
                label_of(model),
                result.documents,
                result.scores,
                settings,
                metric=result.metric,
                labels=result.labels,
            )
            if key is not None and cache is not None:
                _write(Path(cache), key, kept)
        found[task.name] = kept
    return found


def tasks_of(tasks: Any) -> list[Task]:
    """One task or several as a list. Raises: EvaluationError for none, or two of one name."""
    several = isinstance(tasks, Iterable) and not isinstance(tasks, str | os.PathLike)
    found = [task_of(task) for task in tasks] if several else [task_of(tasks)]
    names = [task.name for task in found]
    if not found:
        raise EvaluationError("`tasks` must have at least one task; got none.")
    if len(set(names)) < len(names):
        raise EvaluationError(f"`tasks` must have different names; got {names}. Pass `name` to one of them.")
    return found


def dtype_of(model: Any) -> str:
    """The dtype of a model's base weights."""
    parameter = next((p for n, p in model.named_parameters() if "lora_" not in n and p.is_floating_point()), None)
    return "unknown" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def model_digest(model: Any) -> str:
    """SHA-256 of a model's weights, with its adapters' scalings and which of them are active."""
    scalings = [
        [name, dict(layer.scaling), list(layer.active_adapters), bool(layer.disable_adapters)]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    return digest([weights_digest(model.state_dict()), scalings])


def _read(cache: Path, key: str) -> Scores | None:
    try:
        return read_scores(json.loads((cache / f"{key}.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(cache: Path, key: str, scores: Scores) -> None:
    write_file(cache / f"{key}.json", json.dumps(scores.to_dict()))


def seeds_of(models: Any) -> list[Any]:
    """One model or a list of seeds of it, as a list."""
    if isinstance(models, Sequence) and not isinstance(models, str | os.PathLike):
        if not models:
            raise EvaluationError("A list of seeds must not be empty.")
        return list(models)
    return [models]


def environment() -> dict[str, str]:
    """Versions of what the scores depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "peft", "lm-eval", "lorakit"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
