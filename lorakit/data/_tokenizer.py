"""The tokenizer and the chat template that an adapter was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorakit.errors import DataError, raised_as

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")  # what any tokenizer saved by transformers has
_TEMPLATE_FILE = "chat_template.jinja"


def tokenizer_for(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer beside the adapter or model at `path`; where there is none, that of `base`.

    The chat template beside the adapter wins as well, also over that of the base's tokenizer; where there is none
    beside the adapter it is the base's. `path` and `base` are directories or Hub ids (`path` an adapter's file, too);
    `revision` is that of `base`, or of `path` where there is no `base`.
    Raises: DataError where neither has a tokenizer, and for one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    def load(where: str, revision: str | None) -> Any:
        with raised_as(DataError, f"The tokenizer of {where!r} cannot be loaded"):
            return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)

    where = os.fspath(Path(path).parent if os.path.isfile(path) else path)
    if any(_beside(where, name) for name in _TOKENIZER_FILES):
        tokenizer = load(where, revision if base is None else None)
        if tokenizer.chat_template is None and base is not None and os.fspath(base) != where:
            tokenizer.chat_template = load(os.fspath(base), revision).chat_template
        return tokenizer
    if base is None and not os.path.isdir(where):
        return load(where, revision)  # or what transformers says of it
    if base is None:
        raise DataError(
            f"There is no tokenizer beside {where!r}. Name the base model, or save the tokenizer there with "
            f"`tokenizer.save_pretrained({where!r})`."
        )
    tokenizer = load(os.fspath(base), revision)
    template = _beside(where, _TEMPLATE_FILE)
    if template is not None:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def _beside(where: str, name: str) -> str | None:
    """The file of this name in a directory, or in a repository on the Hub; None where there is none."""
    if os.path.isdir(where):
        file = os.path.join(where, name)
        return file if os.path.isfile(file) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return hf_hub_download(where, name)
    except (EntryNotFoundError, HFValidationError):
        return None
