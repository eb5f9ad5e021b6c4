"""Adapters in a PeftModel: which modules they have, what their factors are, and writing factors back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from lorakit._distributed import fill, whole
from lorakit.errors import UnsupportedModelError
from lorakit.spectral import LowRank
from lorakit.tuners.roles import Role, role_of

_SUPPORTED_TYPES = ("LORA", "FISHERLORA", "SPECLORA")


@dataclass(frozen=True, eq=False)
class LiveModule:
    """One adapted linear module of a live model: ΔW = scaling · B A, with B (d_out, r) and A (r, d_in)."""

    name: str  # in the base model, as in PEFT's `targeted_module_names`
    layer: LoraLayer
    adapter_name: str

    @property
    def role(self) -> Role | None:
        return role_of(self.name)

    @property
    def down(self) -> nn.Module:
        """The module that holds A."""
        return self.layer.lora_A[self.adapter_name]

    @property
    def up(self) -> nn.Module:
        """The module that holds B, and the adapter's bias where it has one."""
        return self.layer.lora_B[self.adapter_name]

    @property
    def rank(self) -> int:
        weight: Any = self.down.weight
        return int(weight.shape[0])

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter_name])

    def factors(self) -> LowRank:
        """The low-rank update; the tensors are the parameters' own memory wherever that is not offloaded."""
        return LowRank(read_weight(self.up), read_weight(self.down), self.scaling)

    def is_linear(self) -> bool:
        """Whether the factors are a linear module's, not those of an embedding, convolution, attention or experts."""
        if isinstance(self.layer, ParamWrapper | MultiheadAttention) or self.adapter_name not in self.layer.lora_A:
            return False
        return isinstance(self.down, nn.Linear) and isinstance(self.up, nn.Linear)


def resolve_adapter_name(model: PeftModel, adapter_name: str | None) -> str:
    """The adapter meant: the one named, or the one active adapter.

    Raises: TypeError for what is not a PeftModel; ValueError for an unknown name, and for none given where several are
    active; UnsupportedModelError for a PEFT method that is not LORA, FISHERLORA or SPECLORA.
    """
    if not isinstance(model, PeftModel):
        wrapped = [name for name in ("module", "_orig_mod") if isinstance(getattr(model, name, None), PeftModel)]
        hint = f" Pass its `.{wrapped[0]}`." if wrapped else ""
        raise TypeError(f"`adapter` must be a peft.PeftModel; got {type(model).__name__}.{hint}")
    if adapter_name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ValueError(
                f"`adapter_name` is needed where not exactly one adapter is active; active are {active}, "
                f"and the model has {sorted(model.peft_config)}."
            )
        adapter_name = active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name` must be one of {sorted(model.peft_config)}; got {adapter_name!r}.")
    peft_type = PeftType(model.peft_config[adapter_name].peft_type).value
    if peft_type not in _SUPPORTED_TYPES:
        raise UnsupportedModelError(
            f"Adapter {adapter_name!r} is of type {peft_type}; supported are {', '.join(_SUPPORTED_TYPES)}."
        )
    return adapter_name


def live_modules(model: PeftModel, adapter_name: str) -> list[LiveModule]:
    """All modules that the adapter adapts, in the model's order, embeddings and convolutions among them."""
    return [
        LiveModule(name, layer, adapter_name)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    ]


def read_weight(module: Any) -> Tensor:
    """The weight of a module, detached; a copy where accelerate keeps it offloaded or fully_shard shards it.

    Of a sharded weight all processes must ask together.
    """
    weight: Tensor = module.weight
    if not weight.is_meta:
        return whole(weight.detach())
    with align_module_device(module):
        weight = module.weight
        return weight.detach().clone()


@torch.no_grad()
def write_weight(module: Any, value: Tensor) -> None:
    """Put `value` into a module's weight, in its dtype and where it lives."""
    weight: Tensor = module.weight
    if not weight.is_meta:
        fill(weight, value)
        return
    with align_module_device(module):
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in module.named_parameters()}
    kept["weight"] = value.to("cpu", kept["weight"].dtype, copy=True)
    module._hf_hook.weights_map = kept
