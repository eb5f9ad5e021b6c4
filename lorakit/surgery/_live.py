"""Adapters as surgery is given them: in a model, or saved ones that are put into their base model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from lorakit._distributed.fsdp import unwrapped
from lorakit.data import tokenizer_for
from lorakit.evaluation import LoadOptions, load_adapted
from lorakit.evaluation._models import load_tokenizer


@dataclass(frozen=True)
class LiveAdapter:
    """A PeftModel, the path that its adapter was loaded from, and the tokenizer that text is read with, if any."""

    model: PeftModel
    source: str | None
    tokenizer: Any


def live(
    adapter: PeftModel | str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    options: LoadOptions | None,
    tokenizer: Any,
) -> LiveAdapter:
    """A PeftModel as it is, or a saved adapter in its base model, as PEFT applies it.

    `tokenizer` may be a path; None is the one beside a saved adapter, or else that of the base model.
    Raises: TypeError for `base` or `options` with a PeftModel, and for a saved adapter without `base`; as
        `lorakit.evaluation.load_adapted`.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = tokenizer_for(tokenizer, base or getattr(adapter, "name_or_path", None) or None)
    if not isinstance(adapter, str | os.PathLike):
        if base is not None or options is not None:
            raise TypeError("`base` and `options` are for the path of a saved adapter; a PeftModel has its base model.")
        model = unwrapped(adapter)
        return LiveAdapter(model, None, load_tokenizer(model) if tokenizer is None else tokenizer)
    if not isinstance(base, str | os.PathLike):
        raise TypeError(
            f"`base` must be the path or Hub id of the base model that {os.fspath(adapter)!r} adapts; got "
            f"{type(base).__name__}. With a base model in memory, put the adapter in by PEFT and pass the PeftModel."
        )
    chosen = load_tokenizer(base, adapter, options) if tokenizer is None else tokenizer
    return LiveAdapter(load_adapted(base, adapter, options), os.fspath(adapter), chosen)
