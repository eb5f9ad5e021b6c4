"""Typed errors, each a subclass of the built-in error that people catch; and findings about an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


class LorakitError(Exception):
    """The base class of lorakit's own errors."""


class RegistrationError(LorakitError, RuntimeError):
    """lorakit's method names could not be registered with PEFT."""


class PatternError(LorakitError, ValueError):
    """A regular expression that is too large, or that takes too long to match."""


class UnsupportedModelError(LorakitError, ValueError):
    """The operation does not support this kind of model, module or adapter."""


class CalibrationError(LorakitError, ValueError):
    """The calibration data, or the loss computed on it, cannot be used."""


class DataError(LorakitError, ValueError):
    """Examples that cannot be read, or that have nothing to learn from."""


class SurgeryError(LorakitError, ValueError):
    """An edit that cannot be made, or that can no longer be undone."""


class AllocationError(LorakitError, ValueError):
    """The budget is too small, or the scores or arguments of an allocation cannot be used."""


class EvaluationError(LorakitError, ValueError):
    """Scores or settings from which no interval or verdict can be had."""


class PlanError(LorakitError, ValueError):
    """A plan of trials that cannot run: its keys, shard, arguments or existing records are wrong."""


class TrialError(LorakitError, RuntimeError):
    """Trials of a plan raised, or were lost with a killed worker. All finished trials are recorded.

    `missing`: the keys of the trials without a record. `failed`: what was raised, by key.
    """

    def __init__(
        self, message: str, *, missing: tuple[str, ...] = (), failed: dict[str, BaseException] | None = None
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.failed = failed or {}


class ExportError(LorakitError, ValueError):
    """An adapter that cannot be written as a plain LoRA."""


class AdapterFileError(LorakitError, ValueError):
    """An adapter or a checkpoint on disk cannot be read, or its parts do not fit together."""


class OverwriteError(LorakitError, FileExistsError):
    """An adapter or a file that is not replaced unasked."""


class MissingExtraError(LorakitError, ImportError):
    """An optional dependency is needed, but not installed."""


@contextlib.contextmanager
def raised_as(kind: type[LorakitError], what: str) -> Iterator[None]:
    """Raise whatever a library raises in the block, over files that it was given, as one error: `what`: its reason.

    Libraries that load models raise nearly every type for a file that is not as they expect. Our own errors pass.
    """
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its message's first line, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Finding:
    """Something that a user should know about an adapter. `code` is stable; `message` is for people.

    `module_name` is None if the finding concerns the whole adapter.
    """

    severity: Literal["error", "warning", "info"]
    code: str
    module_name: str | None
    message: str
