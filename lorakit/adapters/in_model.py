"""Adapters in a PeftModel: which modules they have, what their factors are, and writing factors back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import align_module_device, extract_model_from_parallel
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lorakit._distributed.fsdp import fill, full_tensor
from lorakit.adapters.adapter import Adapter, TensorInfo, row_slices
from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.keys import parse_key
from lorakit.adapters.parse import assemble
from lorakit.adapters.read import TensorDict
from lorakit.errors import UnsupportedModelError
from lorakit.naming.roles import Role, role_of
from lorakit.spectral import LowRank

_SUPPORTED_TYPES = ("LORA", "FISHERLORA", "SPECLORA")
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")  # torch's, around a module within the model, and in its name


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
    return _resolved(adapter_name, list(model.active_adapters), model.peft_config)


def chosen_name(adapter_name: str | None, active: Sequence[str], known: Collection[str]) -> str:
    """The adapter named, or the one active one. Raises: ValueError for an unknown name, and where it takes one."""
    if adapter_name is None:
        if len(active) != 1:
            raise ValueError(
                f"`adapter_name` is needed where not exactly one adapter is active; active are {list(active)}, "
                f"and the model has {sorted(known)}."
            )
        adapter_name = active[0]
    if adapter_name not in known:
        raise ValueError(f"`adapter_name` must be one of {sorted(known)}; got {adapter_name!r}.")
    return adapter_name


def _resolved(adapter_name: str | None, active: list[str], configs: dict[str, Any]) -> str:
    adapter_name = chosen_name(adapter_name, active, configs)
    peft_type = PeftType(configs[adapter_name].peft_type).value
    if peft_type not in _SUPPORTED_TYPES:
        raise UnsupportedModelError(
            f"Adapter {adapter_name!r} is of type {peft_type}; supported are {', '.join(_SUPPORTED_TYPES)}."
        )
    return adapter_name


def live_modules(model: PeftModel, adapter_name: str) -> list[LiveModule]:
    """All modules that the adapter adapts, in the model's order, embeddings and convolutions among them."""
    return [
        LiveModule(_plain(name), layer, adapter_name)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    ]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def find_adapter(model: Any, adapter_name: str | None = None) -> tuple[str, list[LiveModule]]:
    """An adapter's name and the modules it adapts, in a PeftModel or in a model that add_adapter of transformers gave
    one; of a model wrapped for training, in what is inside.

    Raises: as `resolve_adapter_name`.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = []
    if not isinstance(model, PeftModel):
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    if not layers:
        name = resolve_adapter_name(model, adapter_name)
        return name, live_modules(model, name)
    active = sorted({name for _, layer in layers for name in layer.active_adapters})
    configs = {name: one for module in model.modules() for name, one in vars(module).get("peft_config", {}).items()}
    name = _resolved(adapter_name, active, configs)
    return name, [
        LiveModule(_plain(path), layer, name)
        for path, layer in layers
        if name in layer.lora_A or name in layer.lora_embedding_A
    ]


def read_weight(module: Any, name: str = "weight") -> Tensor:
    """A weight of a module, detached; a copy where accelerate keeps it offloaded or fully_shard shards it.

    Of a sharded weight all processes must ask together.
    """
    weight: Tensor = getattr(module, name)
    if not weight.is_meta:
        return full_tensor(weight.detach())
    with align_module_device(module):
        weight = getattr(module, name)
        return weight.detach().clone()


def live_adapter(model: Any, adapter_name: str | None = None) -> Adapter:
    """The view of `lorakit.adapters.open_adapter` over an adapter in a model; scalings are the layers' present ones.

    Only the updates and what belongs to them: no modules_to_save, biases of the base model or embeddings.

    Raises: as `resolve_adapter_name`; UnsupportedModelError for a variant of LoRA that is not covered.
    """
    name = resolve_adapter_name(model, adapter_name)
    config = model.peft_config[name]
    settings = AdapterSettings.from_config(config.to_dict())
    source = _LiveTensors(live_modules(model, name), name)
    adapter = assemble(f"{type(model.get_base_model()).__name__}, adapter {name!r}", settings, source)
    layers = source.layers
    modules = [
        replace(
            module,
            scaling=float(layers[module.name].scaling[name]),
            fan_in_fan_out=bool(getattr(layers[module.name], "fan_in_fan_out", False)),
        )
        for module in adapter.modules
    ]
    return replace(adapter, modules=tuple(modules))


def saved_adapter(model: Any, adapter_name: str | None = None) -> Adapter:
    """The view over all that a checkpoint of an adapter in a model would hold, modules_to_save and the like too.

    Scalings are the layers' present ones. Raises: as `live_adapter`; UnsupportedModelError for offloaded tensors beside
    the updates.
    """
    live = live_adapter(model, adapter_name)
    name = resolve_adapter_name(model, adapter_name)
    live_layers = [module.layer for module in live_modules(model, name)]
    updates = {info.key for m in live.modules for info in (m.A, m.B, *m.extras)}
    tensors = {info: live.tensor(live.source.infos()[info]) for info in updates}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
        if parse_key(key) is not None:
            continue
        if key.endswith(".base_layer.weight") and any(layer.merged for layer in live_layers):
            raise UnsupportedModelError(f"{key} would be saved with what is merged into it; unmerge first.")
        if tensor.is_meta:
            raise UnsupportedModelError(f"{key} is offloaded; save the adapter and name its directory.")
        tensors[key] = full_tensor(tensor.detach())
    raw = {**live.settings.raw}
    raw["base_model_name_or_path"] = raw.get("base_model_name_or_path") or getattr(
        model.get_base_model(), "name_or_path", None
    )
    saved = assemble(live.path, replace(live.settings, raw=raw), TensorDict(tensors))
    own = {module.name: module for module in live.modules}
    modules = [
        replace(m, scaling=own[m.name].scaling, fan_in_fan_out=own[m.name].fan_in_fan_out) for m in saved.modules
    ]
    return replace(saved, modules=tuple(modules))


class _LiveTensors:
    """The tensors of an adapter's layers, under the keys that they have in a checkpoint."""

    def __init__(self, modules: list[LiveModule], adapter_name: str) -> None:
        self.layers: dict[str, Any] = {}
        self._holders: dict[str, tuple[Any, str]] = {}
        for module in modules:
            if isinstance(module.layer, ParamWrapper):
                raise UnsupportedModelError(
                    f"{module.name!r} adapts parameters (`target_parameters`), which is not covered yet."
                )
            self.layers[module.name] = module.layer
            for part in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_spec"):
                holder = getattr(module.layer, part, {})
                if adapter_name in holder:
                    for leaf, _ in holder[adapter_name].named_parameters(recurse=False):
                        self._holders[f"{module.name}.{part}.{leaf}"] = holder[adapter_name], leaf
            for part in ("lora_embedding_A", "lora_embedding_B"):
                holder = getattr(module.layer, part, {})
                if adapter_name in holder:
                    self._holders[f"{module.name}.{part}"] = holder, adapter_name

    def infos(self) -> dict[str, TensorInfo]:
        shapes = {key: getattr(holder, name) for key, (holder, name) in self._holders.items()}
        return {key: TensorInfo(key, tuple(value.shape), value.dtype) for key, value in shapes.items()}

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        yield lambda key: read_weight(*self._holders[key])

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        yield from row_slices(read_weight(*self._holders[key]), step)


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
