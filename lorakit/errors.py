"""Typed errors. Each is also one of the built-in types that people catch."""

from __future__ import annotations


class LorakitError(Exception):
    """The base class of lorakit's own errors."""


class RegistrationError(LorakitError, RuntimeError):
    """lorakit's method names could not be registered with PEFT."""


class UnsupportedModelError(LorakitError, ValueError):
    """A model or module of a kind that the operation does not cover."""


class CalibrationError(LorakitError, ValueError):
    """The calibration data, or the loss computed on it, cannot be used."""


class SurgeryError(LorakitError, ValueError):
    """An edit that cannot be made, or no longer be undone."""


class ExportError(LorakitError, ValueError):
    """An adapter that cannot be written as a plain LoRA."""
