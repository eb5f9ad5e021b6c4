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
from lorakit.adapters.atomic import replaced_directory
from lorakit.serving._formats import FormatModule, FormatReport, check_plain, errors_of, padded
from lorakit.spectral import LowRank

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = "adapters.safetensors"


def write_mlx(adapter: str | os.PathLike[str] | nn.Module | Adapter, out: str | os.PathLike[str]) -> FormatReport:
    """Write a plain LoRA, or a FisherLoRA, as a directory for mlx-lm (``--adapter-path``).

    Module names are those of transformers, which mlx-lm's models share for the common architectures. Tensors are
    float32. The directory takes its place in one step, after every update in it was read back.
    Raises: ExportError for what mlx-lm's LoRA cannot hold; AdapterFileError and UnsupportedModelError as
        `lorakit.adapters.open_adapter`.
    """
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
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "mlx"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        errors = errors_of(view, _read(directory, view))
        size = sum(path.stat().st_size for path in directory.iterdir())
    modules = tuple(FormatModule(m.name, m.name, rank, errors[m.name]) for m in view.modules)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return FormatReport(os.fspath(out), "mlx-lm", 1.0, parameters, size, max(errors.values()), modules)


def _read(directory: Path, view: Adapter) -> dict[str, LowRank]:
    """The updates as mlx-lm's LoRALinear.fuse computes them: (scale · lora_bᵀ) lora_aᵀ."""
    scale = float(json.loads((directory / "adapter_config.json").read_bytes())["lora_parameters"]["scale"])
    tensors = load_file(directory / _WEIGHTS)
    return {
        module.name: LowRank(
            tensors[f"{module.name}.lora_b"].double().mT, tensors[f"{module.name}.lora_a"].double().mT, scale
        )
        for module in view.modules
    }
