"""An adapter as a GGUF file of llama.cpp's, which also Ollama loads (``ADAPTER file.gguf``).

llama.cpp applies one alpha over each tensor's own rank, so all factors are written at one rank, the shorter ones
padded with zeros; alpha is that rank and the scaling is part of B. Tensors are float32.
References: src/llama-adapter.cpp and convert_lora_to_gguf.py of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.adapters import Adapter, AdapterModule, ExtraTensor, open_adapter
from lorakit.errors import ExportError
from lorakit.serving._gguf_architectures import BaseModel, import_gguf, read_base_config
from lorakit.spectral import LowRank

if TYPE_CHECKING:
    from torch import nn

_EXTRAS = {
    "modules_to_save": "fully trained modules (`modules_to_save`)",
    "bias": "trained biases (`bias`)",
    "embedding": "embeddings saved whole (`save_embedding_layers`)",
    "trainable_tokens": "trained tokens (`trainable_token_indices`)",
    "expert_parameters": "adapted parameters (`target_parameters`)",
    "orphan": "tensors that belong to no module",
}
_INSTEAD = "Merge the adapter into its model, and convert that."


@dataclass(frozen=True)
class GGUFReport:
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_gguf(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    out: str | os.PathLike[str],
    *,
    base_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> GGUFReport:
    """Write a plain LoRA, or a FisherLoRA or AdaLoRA, as the GGUF file that llama.cpp loads with ``--lora``.

    The file takes its place in one step, after every update in it was read back and compared with the adapter's.

    Args:
        adapter: what `lorakit.adapters.open_adapter` takes.
        out: the file; an existing one is replaced.
        base_config: the base model's directory or config.json, or the config as a dict. By default that of the
            model, if `adapter` is one, or of the base model that the adapter names.
    Raises: ExportError for what llama.cpp cannot load or would compute differently, and where the config of the base
        model is not found or does not fit; MissingExtraError without the package gguf; AdapterFileError and
        UnsupportedModelError as `open_adapter`.
    """
    import_gguf()
    target = Path(os.path.realpath(out))
    if target.is_dir():
        raise ExportError(f"`out` must be a file; {os.fspath(out)!r} is a directory. Add a name, such as adapter.gguf.")
    view = open_adapter(adapter)
    model_config: Any = getattr(adapter, "config", None)
    if base_config is None and hasattr(model_config, "to_dict"):
        base_config = model_config.to_dict()
    base = read_base_config(base_config, view.settings.base_model)
    _check(view, base)
    names = base.tensor_names([module.name for module in view.modules])
    rank = max(module.rank for module in view.modules)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as directory:
        staging = Path(directory, target.name)
        _write(staging, view, base, names, rank)
        error = _verified(staging, view, base, names)
        parameters = sum(rank * (module.d_out + module.d_in) for module in view.modules)
        report = GGUFReport(os.fspath(out), base.name, rank, float(rank), parameters, staging.stat().st_size, error)
        staging.replace(target)
    return report


def _check(adapter: Adapter, base: BaseModel) -> None:
    """Refuse, by name, adapters that llama.cpp refuses or would misread."""
    adapter.check()
    path, settings = adapter.path, adapter.settings
    if settings.r is None:
        raise ExportError(f"{path}: there is no adapter_config.json beside it, so its scaling is unknown.")
    if settings.peft_type == "SPECLORA":
        raise ExportError(
            f"{path} is a SPECLORA adapter, whose mask is an update of the base weight. Write it as a plain LoRA with "
            f"lorakit.export.to_lora(model, out) first."
        )
    if settings.changes_base:
        raise ExportError(
            f"{path} was made with init_lora_weights={settings.init!r}, which changed the base weights. Save it with "
            f"`path_initial_model_for_weight_conversion` first."
        )
    # A model that is open has these in its config, not among the adapter's tensors.
    configured = [name for name in ("modules_to_save", "target_parameters") if getattr(settings, name)]
    configured += ["trainable_token_indices"] if settings.raw.get("trainable_token_indices") else []
    configured += ["bias"] if settings.raw.get("bias", "none") != "none" else []
    if configured:
        raise ExportError(f"{path} was made with `{configured[0]}`, which llama.cpp does not load. {_INSTEAD}")
    for extra in adapter.extras:
        if not _is_copy_of_base(extra, base):
            raise ExportError(f"{path} has {_EXTRAS[extra.kind]}: {extra.info.key}. llama.cpp loads none. {_INSTEAD}")
    for module in adapter.modules:
        if module.magnitude is not None:
            raise ExportError(
                f"{path}: {module.name!r} has a DoRA magnitude, which llama.cpp does not load. {_INSTEAD}"
            )
        if module.bias is not None:
            raise ExportError(f"{path}: {module.name!r} has a `lora_bias`, which llama.cpp does not load. {_INSTEAD}")
        if module.kind == "conv":
            raise ExportError(f"{path}: {module.name!r} is a convolution, which llama.cpp's adapters cannot update.")
    if not adapter.modules:
        raise ExportError(f"{path}: no module has an update.")


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
    for module in adapter.modules:
        update = adapter.factors(module).to(dtype=torch.float64, device="cpu")
        padding = rank - update.rank
        A = F.pad(update.A, (0, 0, 0, padding)).float()
        B = F.pad(update.B * update.scaling, (0, padding)).float()
        for half, factor in (("A", A), ("B", B)):
            if not bool(factor.isfinite().all()):
                raise ExportError(f"{adapter.path}: {module.name}: lora_{half} has entries that float32 cannot hold.")
        if module.kind == "embedding":  # llama.cpp reads rows of A by token
            A = A.mT
        heads = base.permuted_heads(module.name, module.d_out)
        if heads is not None:
            B = B.reshape(heads, 2, -1, rank).transpose(1, 2).reshape(B.shape)
        writer.add_tensor(f"{names[module.name]}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{names[module.name]}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    largest = 0.0
    for module in adapter.modules:
        A, B = tensors[f"{names[module.name]}.lora_a"], tensors[f"{names[module.name]}.lora_b"]
        written = LowRank(_rows_of_base(B, base, module), A.mT if module.kind == "embedding" else A, alpha / B.shape[1])
        meant = adapter.factors(module).to(dtype=torch.float64, device="cpu")
        error, norm = _norm(written - meant), _norm(meant)
        # Rounding moves each factor by eps/2 of its norm; the rest is for the cancellation in `error` itself.
        factors = torch.linalg.matrix_norm(meant.B) * torch.linalg.matrix_norm(meant.A)
        if not error <= 4 * torch.finfo(torch.float32).eps * abs(float(meant.scaling)) * float(factors):
            raise ExportError(
                f"{module.name}: the update was read back with an error of {error:.2g}, at a norm of {norm:.2g}. "
                f"Nothing was written."
            )
        largest = max(largest, error / norm if norm > 0 else 0.0)
    return largest


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


def _norm(update: LowRank) -> float:
    return float(update.inner(update).clamp(min=0).sqrt())
