"""The main job on a real model: train, audit, compress, operate, export, and certify each result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.demo._data import passages as passages
    from lorakit.demo._data import split_documents as split_documents
    from lorakit.demo._model import load_model as load_model
    from lorakit.demo._report import DemoReport as DemoReport
    from lorakit.demo._report import DemoRow as DemoRow
    from lorakit.demo._run import run_demo as run_demo
    from lorakit.demo._settings import DemoError as DemoError
    from lorakit.demo._settings import DemoSettings as DemoSettings
else:
    __getattr__, __dir__, __all__ = attach(__name__)
