"""Adapters of image models: diffusers' own file, and kohya's, which ComfyUI and others load.

References: diffusers 0.42, loaders/peft.py, load_lora_adapter (metadata under "lora_adapter_metadata"); kohya-ss
sd-scripts, networks/lora.py (lora_down, lora_up, and alpha over the tensor's own rank); ComfyUI, comfy/lora.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.errors import ExportError
from lorakit.serving._formats import FormatModule, FormatReport, check_plain, errors_of, padded, replace_file
from lorakit.serving._overwrite import MARK, check_file, has_marked_tensors, mark_of
from lorakit.spectral import LowRank

if TYPE_CHECKING:
    from torch import nn

_METADATA = "lora_adapter_metadata"
_UNET_BLOCKS = ("down_blocks.", "up_blocks.", "mid_block.")
# What kohya's names begin with, by the prefix that diffusers has.
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}


def write_diffusers(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    out: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    overwrite: bool = False,
) -> FormatReport:
    """Write an adapter of an image model as a file for diffusers' `load_lora_adapter` and `load_lora_weights`.

    The config is in the file's header, where diffusers looks for it; without it diffusers takes alpha = rank and the
    scaling is lost. Factors have one rank, so that the header needs no patterns.

    Args:
        adapter: what `lorakit.adapters.open_adapter` takes.
        out: the file, such as ``pytorch_lora_weights.safetensors``; one that lorakit wrote is replaced.
        prefix: the part of the pipeline that is adapted: "unet", "transformer", "text_encoder" or "text_encoder_2". By
            default "unet" where the modules are named as in a U-Net, else "transformer".
        overwrite: also replace a file that lorakit did not write, or that was changed since.
    Raises: ExportError for what is more than low-rank factors, and for another prefix; OverwriteError.
    """
    check_file(out, has_marked_tensors, overwrite=overwrite)
    view, prefix = _opened(adapter, prefix, "diffusers")
    tensors: dict[str, Tensor] = {}
    rank = 0
    for module, B, A in padded(view):
        rank = A.shape[0]
        tensors[f"{prefix}.{module.name}.lora_A.weight"] = _shaped(A, module)
        tensors[f"{prefix}.{module.name}.lora_B.weight"] = _shaped_up(B, module)
    config = {"r": rank, "lora_alpha": rank, "target_modules": [module.name for module in view.modules]}
    lora_metadata = {f"{prefix}.{key}": value for key, value in config.items()}
    metadata = {"format": "pt", _METADATA: json.dumps(lora_metadata), MARK: mark_of(tensors)}
    errors: dict[str, float] = {}
    size = replace_file(
        out,
        lambda path: save_file(tensors, path, metadata=metadata),
        lambda path: errors.update(errors_of(view, _read_diffusers(path, view, prefix))),
    )
    names = {module.name: f"{prefix}.{module.name}" for module in view.modules}
    return _report(out, "diffusers", 1.0, tensors, size, view, names, errors)


def write_kohya(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    out: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    overwrite: bool = False,
) -> FormatReport:
    """Write an adapter of a diffusers model under kohya's names, as ComfyUI, AUTOMATIC1111 and others load it.

    Each module keeps its own rank and has its own alpha = scaling · rank. Factors keep their dtype.

    Args:
        adapter, prefix, overwrite: as in `write_diffusers`.
        out: the .safetensors file; one that lorakit wrote is replaced.
    Raises: as `write_diffusers`; ExportError where two modules would get one name.
    """
    check_file(out, has_marked_tensors, overwrite=overwrite)
    view, prefix = _opened(adapter, prefix, "kohya's readers")
    names = {module.name: f"{_KOHYA_PREFIXES[prefix]}_{module.name.replace('.', '_')}" for module in view.modules}
    if len(set(names.values())) < len(names):
        raise ExportError(f"{view.path}: two of its modules have the same name when dots are underscores.")
    tensors: dict[str, Tensor] = {}
    for module in view.modules:
        update = view.factors(module)
        name = names[module.name]
        tensors[f"{name}.lora_down.weight"] = _shaped(update.A.cpu(), module)
        tensors[f"{name}.lora_up.weight"] = _shaped_up(update.B.cpu(), module)
        tensors[f"{name}.alpha"] = torch.tensor(module.scaling * module.rank, dtype=torch.float32)
        for half, factor in (("A", update.A), ("B", update.B)):
            if not bool(factor.isfinite().all()):
                raise ExportError(f"{view.path}: {module.name}: lora_{half} has NaN or infinite entries.")
    errors: dict[str, float] = {}
    size = replace_file(
        out,
        lambda path: save_file(tensors, path, metadata={"format": "pt", MARK: mark_of(tensors)}),
        lambda path: errors.update(errors_of(view, _read_kohya(path, view, names))),
    )
    return _report(out, "kohya", None, tensors, size, view, names, errors)


def _opened(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, prefix: str | None, program: str
) -> tuple[Adapter, str]:
    view = open_adapter(adapter)
    check_plain(view, program, embeddings=False, convolutions=True)
    if any(module.groups > 1 for module in view.modules):
        raise ExportError(f"{view.path} adapts a convolution in groups, which {program} cannot read.")
    if prefix is None:
        unet = any(module.name.startswith(_UNET_BLOCKS) for module in view.modules)
        prefix = "unet" if unet else "transformer"
    if prefix not in _KOHYA_PREFIXES:
        raise ExportError(f"`prefix` must be one of {', '.join(_KOHYA_PREFIXES)}; got {prefix!r}.")
    return view, prefix


def _shaped(A: Tensor, module: AdapterModule) -> Tensor:
    """A (rank, d_in) in the layout of the layer: that of a convolution has its kernel's dimensions."""
    return A.reshape(A.shape[0], *module.A.shape[1:]).contiguous()


def _shaped_up(B: Tensor, module: AdapterModule) -> Tensor:
    return B.reshape(*B.shape, *[1] * (len(module.B.shape) - 2)).contiguous()


def _read_diffusers(path: Path, view: Adapter, prefix: str) -> dict[str, LowRank]:
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[_METADATA])
    scaling = config[f"{prefix}.lora_alpha"] / config[f"{prefix}.r"]
    tensors = {key: value.double().flatten(1) for key, value in load_file(path).items()}
    return {
        module.name: LowRank(
            tensors[f"{prefix}.{module.name}.lora_B.weight"], tensors[f"{prefix}.{module.name}.lora_A.weight"], scaling
        )
        for module in view.modules
    }


def _read_kohya(path: Path, view: Adapter, names: dict[str, str]) -> dict[str, LowRank]:
    tensors = load_file(path)
    read = {}
    for module in view.modules:
        down, up = (tensors[f"{names[module.name]}.lora_{half}.weight"].double().flatten(1) for half in ("down", "up"))
        read[module.name] = LowRank(up, down, float(tensors[f"{names[module.name]}.alpha"]) / down.shape[0])
    return read


def _report(
    out: str | os.PathLike[str],
    program: str,
    scaling: float | None,
    tensors: dict[str, Tensor],
    size: int,
    view: Adapter,
    names: dict[str, str],
    errors: dict[str, float],
) -> FormatReport:
    ranks = {module.name: module.rank for module in view.modules}
    if scaling is not None:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    modules = tuple(FormatModule(name, names[name], ranks[name], errors[name]) for name in names)
    parameters = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim)
    return FormatReport(os.fspath(out), program, scaling, parameters, size, max(errors.values()), modules)
