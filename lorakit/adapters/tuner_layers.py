"""The layers that PEFT adapts in a model, by whatever method, each with its name, place and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lorakit.adapters._private import adapter_names
from lorakit.naming.roles import Role, layer_of, role_of


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """What PEFT adapts under one name of the base model: one layer, or an attention and its projections."""

    name: str
    layers: tuple[BaseTunerLayer, ...]
    role: Role | None
    layer: int | None

    @property
    def group(self) -> str:
        """The role, or the last component of the name if there is none."""
        return self.role or self.name.rpartition(".")[2]

    def has(self, adapter_name: str) -> bool:
        return any(adapter_name in adapter_names(layer) for layer in self.layers)

    def parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The adapter's own parameters."""
        for layer in self.layers:
            for container in dict.fromkeys(layer.adapter_layer_names):  # PEFT lists some twice
                entries: Any = getattr(layer, container, {})
                if adapter_name in entries:
                    entry = entries[adapter_name]
                    yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """All adapted layers, in the model's order; for modules that are trained whole see `trained_in_full`.

    An adapted parameter (`target_parameters`) has its own name, such as ``layers.0.mlp.experts.down_proj``; one that is
    called `weight` has its module's.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, list[BaseTunerLayer]] = {}
    skipped: list[str] = []
    attentions: list[str] = []
    for path, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            skipped.append(f"{path}.")
        if not isinstance(module, BaseTunerLayer) or path.startswith(tuple(skipped)):
            continue
        # the projections of an attention have an effect through the attention only
        owner = next((name for name in attentions if path.startswith(f"{name}.base_layer.")), None)
        if owner is None:
            owner = path.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            owner = owner if parameter in (None, "weight") else f"{owner}.{parameter}".lstrip(".")
        if isinstance(module, MultiheadAttention):
            attentions.append(path)
        found.setdefault(owner, []).append(module)
    return [AdaptedLayer(name, tuple(layers), role_of(name), layer_of(name)) for name, layers in found.items()]


def trained_in_full(model: nn.Module) -> list[tuple[str, AuxiliaryTrainingWrapper]]:
    """The modules that PEFT trains beside the adapted layers (modules_to_save, trainable tokens), with their names."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return [(name, module) for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
