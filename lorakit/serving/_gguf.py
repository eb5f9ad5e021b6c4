"""An adapter as a GGUF file of llama.cpp's, which also Ollama loads (``ADAPTER file.gguf``).

llama.cpp applies one alpha over each tensor's own rank, so all factors are written at one rank, the shorter ones
padded with zeros; alpha is that rank and the scaling is part of B. Tensors are float32.
References: src/llama-adapter.cpp and convert_lora_to_gguf.py of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit._format import count
from lorakit._report import Report
from lorakit.adapters import Adapter, AdapterModule, ExtraTensor, open_adapter
from lorakit.errors import ExportError
from lorakit.serving._formats import check_plain, errors_of, padded, replace_file
from lorakit.serving._gguf_architectures import BaseModel, import_gguf, read_base_config
from lorakit.serving._overwrite import MARK, check_file, mark_of
from lorakit.spectral import LowRank

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, repr=False)
class GGUFReport(Report):
    """What `write_gguf` wrote: a scaling of `lora_alpha / r` for every module.

    `parameters` counts the padding too. `error` is the largest relative error of an update that was read back,
    ‖written − meant‖_F / ‖meant‖_F.
    """

    path: str
    architecture: str
    r: int
    lora_alpha: float
    parameters: int
    bytes: int
    error: float

    @property
    def headline(self) -> str:
        """What was written, in a line."""
        return (
            f"{self.path}: an adapter of {self.architecture} at rank {self.r}, {count(self.parameters)} parameters, "
            f"{count(self.bytes)}B; read back with a largest error of {self.error:.1g}."
        )

    @property
    def next_steps(self) -> tuple[str, ...]:
        """How llama.cpp and Ollama load it."""
        return (f"llama-server -m base.gguf --lora {shlex.quote(self.path)}", f"ADAPTER {self.path}  # in a Modelfile")


def write_gguf(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    out: str | os.PathLike[str],
    *,
    base_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> GGUFReport:
    """Write a plain LoRA, or a FisherLoRA or AdaLoRA, as the GGUF file that llama.cpp loads with ``--lora``.

    The file takes its place in one step, after every update in it was read back and compared with the adapter's.

    Args:
        adapter: what `lorakit.adapters.open_adapter` takes.
        out: the file; one that lorakit wrote is replaced.
        base_config: the base model's directory or config.json, or the config as a dict. By default that of the
            model, if `adapter` is one, or of the base model that the adapter names.
        overwrite: also replace a file that lorakit did not write, or that was changed since.
    Raises: ExportError for what llama.cpp cannot load or would compute differently, and where the config of the base
        model is not found or does not fit; OverwriteError; MissingExtraError without the package gguf;
        AdapterFileError and UnsupportedModelError as `open_adapter`.
    """
    import_gguf()
    check_file(out, _is_marked, overwrite=overwrite)
    view = open_adapter(adapter)
    model_config: Any = getattr(adapter, "config", None)
    if base_config is None and hasattr(model_config, "to_dict"):
        base_config = model_config.to_dict()
    base = read_base_config(base_config, view.settings.base_model)
    check_plain(
        view, "llama.cpp", embeddings=True, convolutions=False, ignore=lambda extra: _is_copy_of_base(extra, base)
    )
    names = base.tensor_names([module.name for module in view.modules])
    rank = max(module.rank for module in view.modules)
    errors: list[float] = []
    size = replace_file(
        out,
        lambda path: _write(path, view, base, names, rank),
        lambda path: errors.append(_verified(path, view, base, names)),
    )
    parameters = sum(rank * (module.d_out + module.d_in) for module in view.modules)
    return GGUFReport(os.fspath(out), base.name, rank, float(rank), parameters, size, errors[0])


def _is_copy_of_base(extra: ExtraTensor, base: BaseModel) -> bool:
    """Whether it is the unchanged base weight that PEFT saves beside the LoRA of an embedding."""
    key = extra.info.key
    return extra.kind == "embedding" and ".base_layer." in key and extra.info.shape[0] == base.vocabulary


@torch.no_grad()
def _write(path: Path, adapter: Adapter, base: BaseModel, names: Mapping[str, str], rank: int) -> None:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, base.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    tokens = adapter.settings.raw.get("alora_invocation_tokens")
    if tokens:  # PEFT's aLoRA: the update is active after these tokens
        kind = gguf.GGUFValueType
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(tokens), kind.ARRAY, kind.UINT32)
    tensors: dict[str, Tensor] = {}
    for module, B, A in padded(adapter):
        if module.kind == "embedding":  # llama.cpp reads rows of A by token
            A = A.mT
        heads = base.permuted_heads(module.name, module.d_out)
        if heads is not None:
            B = B.reshape(heads, 2, -1, rank).transpose(1, 2).reshape(B.shape)
        tensors[f"{names[module.name]}.lora_a"] = A.contiguous()
        tensors[f"{names[module.name]}.lora_b"] = B.contiguous()
    writer.add_string(MARK, mark_of(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _is_marked(path: Path) -> bool:
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        mark = reader.get_field(MARK)
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        return mark is not None and bool(mark.contents() == mark_of(tensors))
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError):  # it is no GGUF file, or a broken one
        return False


@torch.no_grad()
def _verified(path: Path, adapter: Adapter, base: BaseModel, names: Mapping[str, str]) -> float:
    """The largest relative error of an update as llama.cpp will compute it.

    Raises: ExportError where one is more than rounding.
    """
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    if tensors.keys() != {f"{name}.lora_{half}" for name in names.values() for half in "ab"}:
        raise ExportError(f"What was written to {path.name!r} has other tensors than were meant; nothing was kept.")
    read = {}
    for module in adapter.modules:
        A, B = tensors[f"{names[module.name]}.lora_a"], tensors[f"{names[module.name]}.lora_b"]
        A = A.mT if module.kind == "embedding" else A
        read[module.name] = LowRank(_rows_of_base(B, base, module), A, alpha / B.shape[1])
    return max(errors_of(adapter, read).values())


def _rows_of_base(B: Tensor, base: BaseModel, module: AdapterModule) -> Tensor:
    """B with its rows where the base model has them: by index, not by the reshaping that `_write` does."""
    heads = base.permuted_heads(module.name, module.d_out)
    if heads is None:
        return B
    row = torch.arange(module.d_out)
    size = module.d_out // heads
    head, within = row // size, row % size
    restored = torch.empty_like(B)
    restored[head * size + (within % 2) * (size // 2) + within // 2] = B
    return restored
