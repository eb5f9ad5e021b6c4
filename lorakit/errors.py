"""Typed errors, each also one of the built-in types that people catch; and findings about an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class LorakitError(Exception):
    """The base class of lorakit's own errors."""


class RegistrationError(LorakitError, RuntimeError):
    """lorakit's method names could not be registered with PEFT."""


class UnsupportedModelError(LorakitError, ValueError):
    """A model, module or adapter of a kind that the operation does not cover."""


class CalibrationError(LorakitError, ValueError):
    """The calibration data, or the loss computed on it, cannot be used."""


class DataError(LorakitError, ValueError):
    """Examples that cannot be read, or that have nothing to learn from."""


class SurgeryError(LorakitError, ValueError):
    """An edit that cannot be made, or no longer be undone."""


class AllocationError(LorakitError, ValueError):
    """Ranks that cannot be had for the budget, or scores that say nothing."""


class EvaluationError(LorakitError, ValueError):
    """Scores or settings from which no interval or verdict can be had."""


class ExportError(LorakitError, ValueError):
    """An adapter that cannot be written as a plain LoRA."""


class AdapterFileError(LorakitError, ValueError):
    """An adapter, or a model's checkpoint, on disk that cannot be read, or whose parts do not fit together."""


class OverwriteError(LorakitError, FileExistsError):
    """A directory has an adapter that is not replaced unasked."""


class MissingExtraError(LorakitError, ImportError):
    """Something needs an optional dependency that is not installed."""


@dataclass(frozen=True)
class Finding:
    """Something worth telling about an adapter; `code` is stable, `message` is for people.

    `module_name` is None for what concerns the whole adapter.
    """

    severity: Literal["error", "warning", "info"]
    code: str
    module_name: str | None
    message: str
