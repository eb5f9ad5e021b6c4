"""The adapted layers of a live model, of whatever PEFT method, each with its name, place and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lorakit.naming.roles import Role, group_of, layer_of, role_of


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """What PEFT adapts under one name in the base model; of an attention with all its projections several layers."""

    name: str
    layers: tuple[BaseTunerLayer, ...]

    @property
    def role(self) -> Role | None:
        return role_of(self.name)

    @property
    def group(self) -> str:
        return group_of(self.name)

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    def has(self, adapter_name: str) -> bool:
        return any(adapter_name in layer._all_available_adapter_names() for layer in self.layers)

    def parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The adapter's own parameters."""
        for layer in self.layers:
            for container in dict.fromkeys(layer.adapter_layer_names):  # PEFT names some twice
                entries: Any = getattr(layer, container, {})
                if adapter_name in entries:
                    entry = entries[adapter_name]
                    yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """All adapted layers, in the model's order; what is trained in full beside them (modules_to_save and trainable
    tokens, see `trained_in_full`) is not among them.

    An adapted parameter (`target_parameters`) goes by its own name, such as ``layers.0.mlp.experts.down_proj``; a
    `weight` by its module's.
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
        # the projections of an attention act through it alone
        owner = next((name for name in attentions if path.startswith(f"{name}.base_layer.")), None)
        if owner is None:
            owner = path.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            owner = owner if parameter in (None, "weight") else f"{owner}.{parameter}".lstrip(".")
        if isinstance(module, MultiheadAttention):
            attentions.append(path)
        found.setdefault(owner, []).append(module)
    return [AdaptedLayer(name, tuple(layers)) for name, layers in found.items()]


def trained_in_full(model: nn.Module) -> list[tuple[str, AuxiliaryTrainingWrapper]]:
    """The modules that PEFT trains beside the adapted layers, by name: modules_to_save and trainable tokens."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return [(name, module) for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
