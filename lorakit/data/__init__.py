"""Examples from files and datasets, as batches with labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.data._loader import DataReport as DataReport
    from lorakit.data._loader import ExampleLoader as ExampleLoader
    from lorakit.data._loader import as_loader as as_loader
    from lorakit.data._loader import loader as loader
    from lorakit.data._tokenizer import tokenizer_for as tokenizer_for
else:
    __getattr__, __dir__, __all__ = attach(__name__)
