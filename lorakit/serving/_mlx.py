"""An adapter as mlx-lm loads it: adapters.safetensors and an adapter_config.json of its own.

mlx-lm applies one `scale` to every module and knows one rank, so factors are padded to the largest; `scale` is 1 and
the scaling is part of lora_b. `keys` are whole module names and `num_layers` is 0, so that exactly these modules get an
adapter. Reference: mlx_lm/tuner/utils.py, linear_to_lora_layers and load_adapters, of mlx-lm 0.32.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.adapters import Adapter, open_adapter
from lorakit.adapters.atomic import CONFIG_NAME, replaced_directory
from lorakit.errors import OverwriteError
from lorakit.serving._formats import FormatModule, FormatReport, check_plain, errors_of, padded
from lorakit.serving._overwrite import MARK, has_marked_tensors, mark_of
from lorakit.spectral import LowRank

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = "adapters.safetensors"


def write_mlx(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, out: str | os.PathLike[str], *, overwrite: bool = False
) -> FormatReport:
    """Write a plain LoRA, or a FisherLoRA, as a directory for mlx-lm (``--adapter-path``).

    Module names are those of transformers, which mlx-lm's models share for the common architectures. Tensors are
    float32. The files take their place in one step, after every update in them was read back. An adapter in `out` that
    this function did not write, PEFT's among them, is replaced only with `overwrite`.
    Raises: ExportError for what mlx-lm's LoRA cannot hold; OverwriteError; AdapterFileError and UnsupportedModelError
        as `lorakit.adapters.open_adapter`.
    """
    _check_directory(out, overwrite=overwrite)
    view = open_adapter(adapter)
    check_plain(view, "mlx-lm", embeddings=True, convolutions=False)
    tensors: dict[str, Tensor] = {}
    rank = 0
    for module, B, A in padded(view):
        rank = A.shape[0]
        tensors[f"{module.name}.lora_a"] = A.mT.contiguous()
        tensors[f"{module.name}.lora_b"] = B.mT.contiguous()
    config = {
        "fine_tune_type": "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": [module.name for module in view.modules],
        },
    }
    with replaced_directory(out) as directory:
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "mlx", MARK: mark_of(tensors)})
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        errors = errors_of(view, _read(directory, view))
        size = sum(path.stat().st_size for path in directory.iterdir())
    modules = tuple(FormatModule(m.name, m.name, rank, errors[m.name]) for m in view.modules)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return FormatReport(os.fspath(out), "mlx-lm", 1.0, parameters, size, max(errors.values()), modules)


def _check_directory(out: str | os.PathLike[str], *, overwrite: bool) -> None:
    there = [name for name in (CONFIG_NAME, _WEIGHTS) if Path(out, name).exists()]
    if there and not overwrite and not has_marked_tensors(Path(out, _WEIGHTS)):
        raise OverwriteError(
            f"`out` {os.fspath(out)!r} has an {there[0]} that lorakit did not write for mlx-lm. Pass `overwrite=True` "
            f"(--overwrite) to replace it, or name another directory."
        )


def _read(directory: Path, view: Adapter) -> dict[str, LowRank]:
    """The updates as mlx-lm's LoRALinear.fuse computes them: (scale · lora_bᵀ) lora_aᵀ."""
    scale = float(json.loads((directory / CONFIG_NAME).read_bytes())["lora_parameters"]["scale"])
    tensors = load_file(directory / _WEIGHTS)
    return {
        module.name: LowRank(
            tensors[f"{module.name}.lora_b"].double().mT, tensors[f"{module.name}.lora_a"].double().mT, scale
        )
        for module in view.modules
    }
