"""Whether another plain LoRA can be made of an adapter, and what of it is carried over as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, AdapterModule, TensorInfo
from lorakit.adapters.atomic import CONFIG_NAME
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.spectral import LowRank


def check_rewritable(adapter: Adapter) -> None:
    """Raise where no plain LoRA with other factors can be made of `adapter`.

    Raises: AdapterFileError for an adapter that is broken or has no config; UnsupportedModelError for kinds that are
    not covered, by name.
    """
    adapter.check()
    path, settings = adapter.path, adapter.settings
    if settings.r is None:
        raise AdapterFileError(f"{path}: there is no {CONFIG_NAME} beside it, so what its factors mean is unknown.")
    if settings.peft_type == "SPECLORA":
        raise UnsupportedModelError(
            f"{path} is a SPECLORA adapter, whose mask is an update of the base weight: its low-rank part cannot be "
            f"rewritten alone. Give the base weights (`base`, --base) to rewrite its whole update, or use "
            f"lorakit.export.to_lora(model, out)."
        )
    if settings.changes_base:
        raise UnsupportedModelError(
            f"{path} was made with init_lora_weights={settings.init!r}, which changed the base weights; its factors "
            f"mean nothing to the original ones. Save it with `path_initial_model_for_weight_conversion` first."
        )
    grouped = [module.name for module in adapter.modules if module.groups > 1]
    if grouped:
        raise UnsupportedModelError(f"{path}: {grouped[0]!r} is a grouped convolution, which is not covered yet.")
    if not adapter.modules:
        raise AdapterFileError(f"{path}: no module has an update.")


def check_finite(adapter: Adapter, module: AdapterModule, update: LowRank) -> None:
    """Raise AdapterFileError where a factor has NaN or infinite entries."""
    for half, factor in (("lora_B", update.B), ("lora_A", update.A)):
        if not bool(factor.isfinite().all()):
            raise AdapterFileError(f"{adapter.path}: {module.name}: {half} has NaN or infinite entries.")


def finite_tensor(adapter: Adapter, info: TensorInfo) -> Tensor:
    """One tensor as it is stored. Raises: AdapterFileError where it has NaN or infinite entries."""
    tensor = adapter.tensor(info)
    if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.isfinite().all()):
        raise AdapterFileError(f"{adapter.path}: {info.key} has NaN or infinite entries.")
    return tensor


def carried_infos(adapter: Adapter) -> dict[str, TensorInfo]:
    """The tensors beside the updates, by key."""
    return {extra.info.key: extra.info for extra in adapter.extras}


def planned_tensor(adapter: Adapter, info: TensorInfo) -> Tensor:
    """A tensor of that shape and dtype without entries, on the device "meta"."""
    dtype = adapter.tensor(info).dtype if info.dtype is None else info.dtype
    return torch.empty(info.shape, dtype=dtype, device="meta")


def contents_of(adapter: Adapter) -> set[str]:
    """What an adapter has that servers refuse: DoRA, lora_bias, modules_to_save, stacked experts."""
    found = set()
    if any(module.magnitude is not None for module in adapter.modules):
        found.add("DoRA")
    if any(module.bias is not None for module in adapter.modules):
        found.add("lora_bias")
    if any(module.experts is not None for module in adapter.modules):
        found.add("stacked experts")
    if any(extra.kind == "modules_to_save" for extra in adapter.extras):
        found.add("modules_to_save")
    return found


def stored_bytes(adapter: Adapter) -> int:
    """Bytes of all tensors of an adapter, as they are stored."""
    return sum(info.numel * info.dtype.itemsize for info in adapter.source.infos().values() if info.dtype is not None)
