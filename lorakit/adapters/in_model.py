"""Adapters in a model in memory: their modules, and reading and writing of their factors."""

from __future__ import annotations

import contextlib
import functools
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

from lorakit._checks import preview
from lorakit._distributed.fsdp import fill, full_tensor
from lorakit.adapters._private import CHECKPOINTED, COMPILED, set_offloaded_weights
from lorakit.adapters.adapter import Adapter, TensorInfo, row_slices
from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.experts import unstacked
from lorakit.adapters.keys import parse_key
from lorakit.adapters.parse import assemble
from lorakit.adapters.read import TensorDict
from lorakit.errors import UnsupportedModelError
from lorakit.naming.roles import Role, role_of
from lorakit.spectral import LowRank

_SUPPORTED_TYPES = ("LORA", "FISHERLORA", "SPECLORA")


@dataclass(frozen=True, eq=False)
class LiveModule:
    """An adapted module of a model: ΔW = scaling · B A, with B (d_out, r) and A (r, d_in) if it is linear.

    `name` is that of the module or parameter in the base model; `layer` is PEFT's layer, and `path` is its name. They
    differ for a parameter (`target_parameters`): ``….experts.down_proj`` may be adapted by ``….experts.base_layer``.
    """

    name: str
    layer: LoraLayer
    adapter_name: str
    path: str

    @functools.cached_property
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
        return int(weight.shape[0]) // (self.experts or 1)

    @property
    def experts(self) -> int | None:
        """How many experts are stacked in the parameter that the layer adapts; None for a module or one matrix."""
        layer: Any = self.layer
        if not isinstance(layer, ParamWrapper) or (layer.num_experts == 1 and layer.parameter_name == "weight"):
            return None
        return int(layer.num_experts)

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter_name])

    def factors(self) -> LowRank:
        """The low-rank update, of stacked experts a batch. Its tensors share the parameters' memory, unless these are
        offloaded or sharded.
        """
        B, A = read_weight(self.up), read_weight(self.down)
        return LowRank(*(unstacked(B, A, self.experts) if self.experts is not None else (B, A)), self.scaling)

    def is_linear(self) -> bool:
        """Whether the layer is linear: no embedding, convolution, attention or stack of experts."""
        if isinstance(self.layer, ParamWrapper | MultiheadAttention) or self.adapter_name not in self.layer.lora_A:
            return False
        return isinstance(self.down, nn.Linear) and isinstance(self.up, nn.Linear)


def check_no_stacks(modules: Sequence[LiveModule], purpose: str) -> None:
    """Raise UnsupportedModelError, with their names, for experts stacked in parameters: their tokens are multiplied
    expert by expert, so that what an example contributes cannot be seen at the layer.
    """
    stacks = [module.name for module in modules if isinstance(module.layer, ParamWrapper)]
    if stacks:
        raise UnsupportedModelError(
            f"{purpose} must tell examples apart, which it cannot in {len(stacks)} adapted parameters "
            f"(`target_parameters`), where tokens of all examples are multiplied expert by expert: {preview(stacks)}. "
            f"Leave them out of `target_modules`."
        )


def resolve_adapter_name(model: PeftModel, adapter_name: str | None) -> str:
    """`adapter_name`, or the name of the active adapter if it is None.

    Raises: TypeError if `model` is not a PeftModel; ValueError for an unknown name, and for None unless exactly one
    adapter is active; UnsupportedModelError for PEFT methods other than LORA, FISHERLORA and SPECLORA.
    """
    if not isinstance(model, PeftModel):
        wrapped = [name for name in ("module", COMPILED) if isinstance(getattr(model, name, None), PeftModel)]
        hint = f" Pass its `.{wrapped[0]}`." if wrapped else ""
        raise TypeError(f"`adapter` must be a peft.PeftModel; got {type(model).__name__}.{hint}")
    return _supported_name(adapter_name, list(model.active_adapters), model.peft_config)


def chosen_name(adapter_name: str | None, active: Sequence[str], known: Collection[str]) -> str:
    """`adapter_name`, which must be one of `known`, or the only one in `active` if it is None. Raises: ValueError."""
    if adapter_name is None:
        if len(active) != 1:
            raise ValueError(
                f"`adapter_name` is needed unless exactly one adapter is active; active are {list(active)}, and the "
                f"model has {sorted(known)}."
            )
        adapter_name = active[0]
    if adapter_name not in known:
        raise ValueError(f"`adapter_name` must be one of {sorted(known)}; got {adapter_name!r}.")
    return adapter_name


def _supported_name(adapter_name: str | None, active: list[str], configs: dict[str, Any]) -> str:
    adapter_name = chosen_name(adapter_name, active, configs)
    peft_type = PeftType(configs[adapter_name].peft_type).value
    if peft_type not in _SUPPORTED_TYPES:
        raise UnsupportedModelError(
            f"Adapter {adapter_name!r} is of type {peft_type}; supported are {', '.join(_SUPPORTED_TYPES)}."
        )
    return adapter_name


def live_modules(model: PeftModel, adapter_name: str) -> list[LiveModule]:
    """All modules that the adapter adapts, in the model's order, including embeddings and convolutions."""
    return _modules_of(model.get_base_model(), adapter_name)


def _modules_of(model: nn.Module, adapter_name: str) -> list[LiveModule]:
    return [
        LiveModule(parameter_name(path, layer), layer, adapter_name, path)
        for path, layer in ((strip_wrappers(name), layer) for name, layer in model.named_modules())
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    ]


def parameter_name(path: str, layer: Any) -> str:
    """The name in the base model of what a layer adapts: a module, or a parameter that is not called ``weight``."""
    if not isinstance(layer, ParamWrapper):
        return path
    owner = path
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    return owner if layer.parameter_name == "weight" else f"{owner}.{layer.parameter_name}"


def strip_wrappers(name: str) -> str:
    """A module's name without those of torch.compile's and activation checkpointing's wrappers."""
    return ".".join(part for part in name.split(".") if part not in (CHECKPOINTED, COMPILED))


def find_adapter(model: Any, adapter_name: str | None = None) -> tuple[str, list[LiveModule]]:
    """An adapter's name and its modules, in a PeftModel or in a model with an adapter by transformers' `add_adapter`.

    A model may be wrapped for training, by DistributedDataParallel or torch.compile for instance.
    Raises: as `resolve_adapter_name`.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = []
    if not isinstance(model, PeftModel):
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not layers:
        name = resolve_adapter_name(model, adapter_name)
        return name, live_modules(model, name)
    active = sorted({name for layer in layers for name in layer.active_adapters})
    configs = {name: one for module in model.modules() for name, one in vars(module).get("peft_config", {}).items()}
    name = _supported_name(adapter_name, active, configs)
    return name, _modules_of(model, name)


def read_weight(module: Any, name: str = "weight") -> Tensor:
    """A weight of a module, detached; a copy if accelerate has offloaded it or `fully_shard` has sharded it.

    A sharded weight must be read by all processes together.
    """
    weight: Tensor = getattr(module, name)
    if not weight.is_meta:
        return full_tensor(weight.detach())
    with align_module_device(module):
        weight = getattr(module, name)
        return weight.detach().clone()


def live_adapter(model: Any, adapter_name: str | None = None) -> Adapter:
    """An adapter in a model as `lorakit.adapters.open_adapter` returns it, with the layers' present scalings.

    It has the updates and what belongs to them; modules_to_save, biases of the base model and embeddings are left out.
    Raises: as `resolve_adapter_name`; UnsupportedModelError for a variant of LoRA that is not supported.
    """
    name = resolve_adapter_name(model, adapter_name)
    config = model.peft_config[name]
    settings = AdapterSettings.from_config(config.to_dict())
    source = _LiveTensors(live_modules(model, name), name)
    adapter = assemble(f"{type(model.get_base_model()).__name__}, adapter {name!r}", settings, source)
    live = {module.path: module for module in source.modules}
    modules = [
        replace(
            module,
            name=live[module.path].name,
            scaling=live[module.path].scaling,
            fan_in_fan_out=bool(getattr(live[module.path].layer, "fan_in_fan_out", False)),
        )
        for module in adapter.modules
    ]
    return replace(adapter, modules=tuple(modules))


def saved_adapter(model: Any, adapter_name: str | None = None) -> Adapter:
    """An adapter in a model with everything that PEFT would save, modules_to_save and the like included.

    Scalings are the layers' present ones. Raises: as `live_adapter`; UnsupportedModelError if tensors beside the
    updates are offloaded.
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
            raise UnsupportedModelError(
                f"{key} would be saved with an adapter merged into it; unmerge first (`unmerge_adapter()`)."
            )
        if tensor.is_meta:
            raise UnsupportedModelError(f"{key} is offloaded. Save the adapter and pass its directory instead.")
        tensors[key] = full_tensor(tensor.detach())
    raw = {**live.settings.raw}
    raw["base_model_name_or_path"] = raw.get("base_model_name_or_path") or getattr(
        model.get_base_model(), "name_or_path", None
    )
    saved = assemble(live.path, replace(live.settings, raw=raw), TensorDict(tensors))
    own = {module.path: module for module in live.modules}
    modules = [
        replace(
            module,
            name=own[module.path].name,
            scaling=own[module.path].scaling,
            fan_in_fan_out=own[module.path].fan_in_fan_out,
        )
        for module in saved.modules
    ]
    return replace(saved, modules=tuple(modules))


class _LiveTensors:
    """The tensors of an adapter's layers, under the keys that PEFT saves them with."""

    def __init__(self, modules: list[LiveModule], adapter_name: str) -> None:
        self.modules = modules
        self._holders: dict[str, tuple[Any, str]] = {}
        for module in modules:
            for part in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_spec"):
                holder = getattr(module.layer, part, {})
                if adapter_name in holder:
                    for leaf, _ in holder[adapter_name].named_parameters(recurse=False):
                        self._holders[f"{module.path}.{part}.{leaf}"] = holder[adapter_name], leaf
            for part in ("lora_embedding_A", "lora_embedding_B"):
                holder = getattr(module.layer, part, {})
                if adapter_name in holder:
                    self._holders[f"{module.path}.{part}"] = holder, adapter_name

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
    """Write `value` into a module's weight, in the weight's dtype and on its device."""
    weight: Tensor = module.weight
    if not weight.is_meta:
        fill(weight, value)
        return
    with align_module_device(module):
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in module.named_parameters()}
    kept["weight"] = value.to("cpu", kept["weight"].dtype, copy=True)
    set_offloaded_weights(module, kept)
