"""Frobenius norms of base weights, kept in a cache file: reading a large model for them takes minutes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit.adapters.adapter import AdapterModule
from lorakit.adapters.base_weights import open_module_weights


def base_norms(base: str | os.PathLike[str] | nn.Module, modules: Sequence[AdapterModule]) -> dict[str, float]:
    """‖W‖_F of the base weight of each module that the base has, by the module's name.

    The norms of a base on disk are kept in lorakit/base_norms below $XDG_CACHE_HOME (by default ~/.cache), in a file
    that belongs to the path, sizes and times of the base's files. A cache that cannot be read or written is passed by.

    Raises: as `lorakit.adapters.base_weights.open_module_weights`, which reads the base.
    """
    read = open_module_weights(base, modules, dequantize=True).read
    if isinstance(base, nn.Module):
        return {name: _norm(weight()) for name, weight in read.items()}
    cache = _cache_file(Path(base))
    known = _known(cache)
    missing = [name for name in read if name not in known]
    if missing:
        for name in tqdm(missing, desc="norms of base weights", delay=1.0, unit="module", leave=False, disable=None):
            known[name] = _norm(read[name]())
        _keep(cache, known)
    return {name: known[name] for name in read}


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))


def _cache_file(base: Path) -> Path:
    files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([str(base.resolve()), stats]).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "lorakit" / "base_norms" / f"{digest[:32]}.json"


def _known(cache: Path) -> dict[str, float]:
    try:
        found = json.loads(cache.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values())
    return found if whole else {}


def _keep(cache: Path, norms: dict[str, float]) -> None:
    """Write the cache beside its place and exchange it, so that no other process reads half of it."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(norms, file)
            os.replace(name, cache)
        except OSError:
            os.unlink(name)
            raise
