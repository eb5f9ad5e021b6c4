"""A bench's arguments from a YAML file."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions, choices, exact_match, lm_eval, loss
from lorakit.experiments._bench import bench
from lorakit.experiments._bench_settings import PROBE_FIELDS

_OPTIONS = tuple(field.name for field in fields(LoadOptions))
_CALL = ("options", "executor", "shard", "progress")  # of the call, not of the bench
_ARGUMENTS = {name: parameter for name, parameter in inspect.signature(bench).parameters.items() if name not in _CALL}
_NEEDED = tuple(name for name, parameter in _ARGUMENTS.items() if parameter.default is inspect.Parameter.empty)
_LOADER = tuple(name for name in inspect.signature(loader).parameters if name not in ("tokenizer", "progress"))
_TASKS: dict[str, Callable[..., Any]] = {
    "loss": loss,
    "choices": choices,
    "exact_match": exact_match,
    "lm_eval": lm_eval,
}
_NUMBERS = ("margin", "learning_rate", "weight_decay", "energy", "alpha", "gate", "tolerance")


def read_bench_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `lorakit.experiments.bench` that a YAML file has.

    Its keys are the names of the arguments, and of the fields of `lorakit.evaluation.LoadOptions`. `probe` is a mapping
    of LoraConfig's fields. A task is a path, or a mapping with the name of a function of `lorakit.evaluation` (loss,
    choices, exact_match or lm_eval), its first argument beside it, and its other arguments as further keys.

    Raises: EvaluationError, which names the file and the key, for a file that is not YAML or not a mapping, keys that
    are missing, unknown or there twice, and values of another form; OSError for a file that is not there.
    """
    file = os.fspath(path)
    content = _parsed(Path(path).read_text(encoding="utf-8"), file)
    _check_keys(content, (*_ARGUMENTS, *_OPTIONS), file, "")
    missing = [name for name in _NEEDED if name not in content]
    if missing:
        raise EvaluationError(f"{file}: the key {missing[0]!r} is needed (needed are {', '.join(_NEEDED)}).")
    for name in _NUMBERS:
        if name in content:
            content[name] = _number(content[name])
    probe = content["probe"]
    if not isinstance(probe, Mapping):
        raise EvaluationError(f"{file}: `probe` must be a mapping of LoraConfig's fields; got {probe!r}.")
    _check_keys(probe, PROBE_FIELDS, file, "probe.")
    if isinstance(content["train"], Mapping):
        _check_keys(content["train"], _LOADER, file, "train.")
    given = content["tasks"] if isinstance(content["tasks"], list) else [content["tasks"]]
    content["tasks"] = [_task(task, file, f"tasks[{i}]") for i, task in enumerate(given)]
    try:
        content["options"] = LoadOptions(**{name: content.pop(name) for name in _OPTIONS if name in content})
    except (EvaluationError, TypeError) as error:
        raise EvaluationError(f"{file}: {error}") from error
    return content


def _parsed(text: str, file: str) -> dict[str, Any]:
    try:
        for node in _mappings(yaml.compose(text, Loader=yaml.SafeLoader)):
            names = [key.value for key, _ in node.value]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise EvaluationError(f"{file}: the key {twice[0]!r} is there twice (line {node.start_mark.line + 1}).")
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvaluationError(f"{file} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{file} must have a mapping of keys to values; got {type(content).__name__}.")
    return content


def _mappings(node: Any) -> list[Any]:
    """All mappings of a YAML document."""
    if node is None or isinstance(node.value, str):
        return []
    inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    return [*([node] if node.id == "mapping" else []), *(found for part in inner for found in _mappings(part))]


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], file: str, where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
            raise EvaluationError(f"{file}: the key {f'{where}{key}'!r} is not known; {hint}")


def _task(given: Any, file: str, where: str) -> Any:
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        raise EvaluationError(f"{file}: `{where}` must be a path, or a mapping such as {{loss: test.jsonl}}.")
    kinds = [key for key in given if key in _TASKS]
    if len(kinds) != 1:
        raise EvaluationError(
            f"{file}: `{where}` must have one of the keys {', '.join(_TASKS)}, with the path or name of the task; got "
            f"the keys {', '.join(map(str, given)) or 'none'}."
        )
    make = _TASKS[kinds[0]]
    first, *others = inspect.signature(make).parameters
    others = [name for name in others if name != "options" or kinds[0] != "loss"]
    if kinds[0] == "loss":
        others += [
            name for name in inspect.signature(loader).parameters if name not in ("source", "tokenizer", "progress")
        ]
    _check_keys(given, (kinds[0], *others), file, f"{where}.")
    arguments = {first: given[kinds[0]], **{key: value for key, value in given.items() if key != kinds[0]}}
    if "margin" in arguments:
        arguments["margin"] = _number(arguments["margin"])
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{file}: `{where}`: {error}") from error


def _number(value: Any) -> Any:
    """YAML reads 2e-4 as text, because it has no point."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return number if not isinstance(number, float) or math.isfinite(number) else value
