"""SHA-256 of weights, adapters, data and tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.adapters import open_adapter
from lorakit.errors import EvaluationError
from lorakit.evaluation._attach import without_adapters
from lorakit.evaluation._models import AdapterSource

if TYPE_CHECKING:
    from peft import PeftModel


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes. Raises: EvaluationError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EvaluationError(f"{os.fspath(path)!r} cannot be read: {error}.") from error


def data_digest(source: Any) -> str:
    """SHA-256 of a file, of a Dataset's fingerprint, of texts, of batches of tensors, or of a dataset's id."""
    if isinstance(source, str | os.PathLike):
        return file_digest(source) if Path(source).is_file() else digest(os.fspath(source))
    if hasattr(source, "column_names"):
        return digest(str(getattr(source, "_fingerprint", None) or source.to_dict()))
    return digest([one if isinstance(one, str) else weights_digest(one) for one in source])


def document_digests(batch: Mapping[str, Tensor]) -> list[str]:
    """A hash of each document of a batch, of its tokens and labels without the padding."""
    mask = batch.get("attention_mask")
    found = []
    for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[i].bool()
        found.append(digest([labels[real].tolist(), ids[real].tolist()]))
    return found


def document_hashes(batches: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """The hashes of a loader's documents, by which `certify(..., used_documents=…)` refuses to use them again.

    A document's hash is of its tokens and labels, as `loss` and `agreement` have it; tasks of lm-evaluation-harness
    have hashes of their own.
    """
    return [document for batch in batches for document in document_digests(batch)]


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name: names, shapes, dtypes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def base_digest(model: Any) -> str:
    """SHA-256 of a base model's weights, the same whether an adapter is attached or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with without_adapters(inner):
        return weights_digest(inner.state_dict())


def adapter_digest(adapter: AdapterSource | PeftModel) -> str:
    """SHA-256 of an adapter: its tensors, and each module's scaling."""
    view = open_adapter(adapter)
    with view.source.reader() as read:
        tensors = {key: read(key) for key in view.source.infos()}
    scalings = torch.tensor([module.scaling for module in view.modules], dtype=torch.float64)
    return weights_digest({**tensors, "": scalings})


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of how a tokenizer splits text, of its special tokens, and of its chat template."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return digest([rules, special, getattr(tokenizer, "chat_template", None)])
