"""The arguments of a bench, or of a comparison of methods, from a YAML file."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions, choices, classification, exact_match, lm_eval, loss
from lorakit.evaluation._classification import OPTIONS as CLASSIFICATION_OPTIONS
from lorakit.experiments._bench import bench
from lorakit.experiments._bench_settings import PROBE_FIELDS
from lorakit.experiments._compare import compare_methods

_OPTIONS = tuple(field.name for field in fields(LoadOptions))
_CALL = ("options", "executor", "shard", "progress")  # of the call, not of the bench
_LOADER = tuple(name for name in inspect.signature(loader).parameters if name not in ("tokenizer", "progress"))
_TASKS: dict[str, Callable[..., Any]] = {
    "loss": loss,
    "choices": choices,
    "exact_match": exact_match,
    "lm_eval": lm_eval,
}
_METHODS_TASKS = {**_TASKS, "classification": classification}
_MORE: dict[str, tuple[str, ...]] = {"loss": _LOADER[1:], "classification": CLASSIFICATION_OPTIONS}  # their `**options`


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML in which 2e-4 is a number, as in version 1.2, also without a point."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_bench_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `lorakit.experiments.bench` that a YAML file has.

    Its keys are the names of the arguments, and of the fields of `lorakit.evaluation.LoadOptions`. `probe` is a mapping
    of LoraConfig's fields. A task is a path, or a mapping with the name of a function of `lorakit.evaluation` (loss,
    choices, exact_match or lm_eval), its first argument beside it, and its other arguments as further
    keys.

    Raises: EvaluationError, which names the file and the key, for a file that is not YAML or not a mapping, keys that
    are missing, unknown or there twice, and values of another form; OSError for a file that is not there.
    """
    return _bench_arguments(_parsed(path), os.fspath(path))


def read_methods_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `lorakit.experiments.compare_methods` that a YAML file has, in the form of `read_bench_file`.

    `methods` maps each name to the fields of a PEFT config with its `peft_type`. Raises: as `read_bench_file`.
    """
    return _methods_arguments(_parsed(path), os.fspath(path))


def read_either_file(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """The name of the function that a file is for ("compare_methods" where it has `methods`), and its arguments."""
    content, file = _parsed(path), os.fspath(path)
    if "methods" in content:
        return "compare_methods", _methods_arguments(content, file)
    return "bench", _bench_arguments(content, file)


def _bench_arguments(content: dict[str, Any], file: str) -> dict[str, Any]:
    found = _arguments(content, bench, _TASKS, file)
    probe = found["probe"]
    if not isinstance(probe, Mapping):
        raise EvaluationError(f"{file}: `probe` must be a mapping of LoraConfig's fields; got {probe!r}.")
    _check_keys(probe, PROBE_FIELDS, file, "probe.")
    if isinstance(found["train"], Mapping):
        _check_keys(found["train"], _LOADER, file, "train.")
    return found


def _methods_arguments(content: dict[str, Any], file: str) -> dict[str, Any]:
    found = _arguments(content, compare_methods, _METHODS_TASKS, file)
    methods = found["methods"]
    if not isinstance(methods, Mapping) or not all(isinstance(one, Mapping) for one in methods.values()):
        raise EvaluationError(f"{file}: `methods` must map names to mappings of a PEFT config's fields.")
    return found


def _arguments(
    content: dict[str, Any], function: Callable[..., Any], tasks: Mapping[str, Callable[..., Any]], file: str
) -> dict[str, Any]:
    """The arguments that both kinds have in one form."""
    known = {name: one for name, one in inspect.signature(function).parameters.items() if name not in _CALL}
    _check_keys(content, (*known, *_OPTIONS), file, "")
    needed = [name for name, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in content]
    if missing:
        raise EvaluationError(f"{file}: the key {missing[0]!r} is needed (needed are {', '.join(needed)}).")
    given = content["tasks"] if isinstance(content["tasks"], list) else [content["tasks"]]
    content["tasks"] = [_task(task, tasks, file, f"tasks[{i}]") for i, task in enumerate(given)]
    try:
        content["options"] = LoadOptions(**{name: content.pop(name) for name in _OPTIONS if name in content})
    except (EvaluationError, TypeError) as error:
        raise EvaluationError(f"{file}: {error}") from error
    return content


def _parsed(path: str | os.PathLike[str]) -> dict[str, Any]:
    text, file = Path(path).read_text(encoding="utf-8"), os.fspath(path)
    try:
        for node in _mappings(yaml.compose(text, Loader=_Loader)):
            names = [key.value for key, _ in node.value]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise EvaluationError(f"{file}: the key {twice[0]!r} is there twice (line {node.start_mark.line + 1}).")
        content = yaml.load(text, Loader=_Loader)
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


def _task(given: Any, tasks: Mapping[str, Callable[..., Any]], file: str, where: str) -> Any:
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        raise EvaluationError(f"{file}: `{where}` must be a path, or a mapping such as {{loss: test.jsonl}}.")
    kinds = [key for key in given if key in tasks]
    if len(kinds) != 1:
        raise EvaluationError(
            f"{file}: `{where}` must have one of the keys {', '.join(tasks)}, with the path or name of the task; got "
            f"the keys {', '.join(map(str, given)) or 'none'}."
        )
    make = tasks[kinds[0]]
    first, *others = inspect.signature(make).parameters
    others = [name for name in others if name != "options" or kinds[0] not in _MORE]
    others += _MORE.get(kinds[0], ())
    _check_keys(given, (kinds[0], *others), file, f"{where}.")
    arguments = {first: given[kinds[0]], **{key: value for key, value in given.items() if key != kinds[0]}}
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{file}: `{where}`: {error}") from error
