"""Adapters as surgery is given them: in a model, or saved ones that are put into their base model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from lorakit._distributed.fsdp import unwrapped
from lorakit.data import tokenizer_for
from lorakit.data._sources import is_source
from lorakit.evaluation import LoadOptions, load_adapted
from lorakit.evaluation._models import load_tokenizer


@dataclass(frozen=True)
class LiveAdapter:
    """A PeftModel, the path that its adapter was loaded from, if it was, and the tokenizer that was given or found."""

    model: PeftModel
    source: str | None
    tokenizer: Any

    def tokenizer_of(self, loader: Any) -> Any:
        """What `lorakit.data` is to read `loader` with: nothing where it yields batches, unless a user says so."""
        return self.tokenizer if self.source is None or is_source(loader) else None

    @property
    def task_tokenizer(self) -> Any:
        """What tasks are scored with: the one above, or else that of the base model."""
        return load_tokenizer(self.model) if self.tokenizer is None else self.tokenizer


def live(
    adapter: PeftModel | str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    options: LoadOptions | None,
    tokenizer: Any,
) -> LiveAdapter:
    """A PeftModel as it is, or a saved adapter in its base model, as PEFT applies it.

    `tokenizer` may be a path; None is for a saved adapter the one beside it, or else that of the base model.
    Raises: TypeError for `base` or `options` with a PeftModel, and for a saved adapter without `base`; as
        `lorakit.evaluation.load_adapted`.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = tokenizer_for(tokenizer, base or getattr(adapter, "name_or_path", None) or None)
    if not isinstance(adapter, str | os.PathLike):
        if base is not None or options is not None:
            raise TypeError("`base` and `options` are for the path of a saved adapter; a PeftModel has its base model.")
        return LiveAdapter(unwrapped(adapter), None, tokenizer)
    if not isinstance(base, str | os.PathLike):
        raise TypeError(
            f"`base` must be the path or Hub id of the base model that {os.fspath(adapter)!r} adapts; got "
            f"{type(base).__name__}. With a base model in memory, put the adapter in by PEFT and pass the PeftModel."
        )
    chosen = load_tokenizer(base, adapter, options) if tokenizer is None else tokenizer
    return LiveAdapter(load_adapted(base, adapter, options), os.fspath(adapter), chosen)
