"""Which modules of an adapter surgery works on, and which it cannot."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from peft import PeftModel

from lorakit._checks import preview
from lorakit._distributed.fsdp import is_sharded
from lorakit.adapters.in_model import LiveModule, check_no_stacks, live_modules
from lorakit.errors import SurgeryError, UnsupportedModelError
from lorakit.naming.roles import RESIDUAL_WRITING


def select_modules(
    adapter: PeftModel, adapter_name: str, target_modules: str | Sequence[str] | None
) -> list[LiveModule]:
    """The adapted modules that `target_modules` selects, at least one; see `lorakit.surgery.sensitivity`.

    The defaults leave out experts stacked in parameters, with a warning.
    Raises: UnsupportedModelError if a selected module is not linear, or a stack of experts; SurgeryError if none is
    selected, or if `target_modules` is not a valid regular expression.
    """
    available = live_modules(adapter, adapter_name)
    if target_modules is None:
        chosen = [module for module in available if module.is_linear() and module.role in RESIDUAL_WRITING]
    elif target_modules == "all-linear":
        chosen = [module for module in available if module.is_linear()]
    elif isinstance(target_modules, str):
        try:
            chosen = [module for module in available if re.fullmatch(target_modules, module.name)]
        except re.error as error:
            raise SurgeryError(
                f"`target_modules` must be a list of names or a regular expression; {target_modules!r} is not one: "
                f"{error}."
            ) from error
    else:
        wanted = list(target_modules)
        ends = tuple(f".{name}" for name in wanted)
        chosen = [module for module in available if module.name in wanted or module.name.endswith(ends)]
    stacks = [module.name for module in available if module.experts is not None]
    if target_modules in (None, "all-linear") and stacks:
        warnings.warn(
            f"Surgery leaves out {len(stacks)} stacks of experts, in which examples cannot be told apart: "
            f"{preview(stacks)}.",
            stacklevel=5,
        )
    if not chosen:
        leaves = sorted({module.name.rpartition(".")[2] for module in available})
        asked = (
            "no module that writes to the residual stream (the default)"
            if target_modules is None
            else f"no module that matches target_modules={target_modules!r}"
        )
        raise SurgeryError(
            f"Adapter {adapter_name!r} has {asked}. It adapts {len(available)} modules named {leaves}; pass some of "
            f"these names as `target_modules`."
        )
    check_no_stacks(chosen, "Surgery")
    unfit = [module for module in chosen if not module.is_linear()]
    if unfit:
        raise UnsupportedModelError(
            f"Surgery edits linear modules, but {unfit[0].name!r} is a layer of type {type(unfit[0].layer).__name__}. "
            f"Leave it out of `target_modules`."
        )
    return chosen


def check_layers(adapter: PeftModel, adapter_name: str, modules: Sequence[LiveModule]) -> None:
    """Raises: SurgeryError or UnsupportedModelError if a module's factors cannot be replaced during a pass."""
    for module in modules:
        layer = module.layer
        if layer.merged:
            raise SurgeryError(
                f"Adapters {layer.merged_adapters} are merged into {module.name!r}, so its factors take no part in the "
                f"forward pass. Call unmerge_adapter() first."
            )
        if layer.use_dora.get(adapter_name) or adapter_name in layer.lora_variant:
            variant = "DoRA" if layer.use_dora.get(adapter_name) else type(layer.lora_variant[adapter_name]).__name__
            raise UnsupportedModelError(
                f"{module.name!r} uses {variant}, whose update is more than the product of two factors. Surgery edits "
                f"plain low-rank updates."
            )
        if layer.disable_adapters:
            raise SurgeryError(f"The adapters of {module.name!r} are disabled. Enable them first.")
    owners = _owners(adapter, adapter_name)
    for module in modules:
        for names in owners:
            if module.name in names:
                raise UnsupportedModelError(
                    f"The modules {sorted(names)} share factors (tied adapters), so editing one would edit the others."
                )


def _owners(adapter: PeftModel, adapter_name: str) -> list[set[str]]:
    """The sets of modules that share the memory of a factor."""
    owners: dict[tuple[bool, int], set[str]] = {}
    for module in live_modules(adapter, adapter_name):
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            factors = getattr(module.layer, name)
            if adapter_name not in factors:
                continue
            weight = getattr(factors[adapter_name], "weight", factors[adapter_name])
            if not weight.is_meta:
                sharded = is_sharded(weight)
                memory = sharded, id(weight) if sharded else weight.data_ptr()
                owners.setdefault(memory, set()).add(module.name)
    return [names for names in owners.values() if len(names) > 1]
