"""Adapters for programs that are not PEFT: the formats that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit import _lazy

if TYPE_CHECKING:
    from lorakit.serving._gguf import GGUFReport as GGUFReport
    from lorakit.serving._gguf import write_gguf as write_gguf
else:
    __getattr__, __dir__, __all__ = _lazy.attach(__name__)
