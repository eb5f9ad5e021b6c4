"""Whether adapters can be merged, and what their merge has beside the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.adapters import Adapter, AdapterModule, TensorInfo
from lorakit.adapters.lora_config import spelled_out
from lorakit.adapters.rewritable import carried_infos, finite_tensor
from lorakit.errors import Finding, UnsupportedModelError

Present = Mapping[str, Mapping[int, AdapterModule]]  # modules by name, and by the place of their adapter

# Fields of the configs on which adapters must agree, for one config to say what all of them mean.
_AGREE = ("bias", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")


def modules_of(views: Sequence[Adapter]) -> dict[str, dict[int, AdapterModule]]:
    """The modules of all adapters by name, each by the place of its adapter.

    Raises: ValueError where shapes differ; UnsupportedModelError for DoRA and `lora_bias`, which cannot be summed.
    """
    found: dict[str, dict[int, AdapterModule]] = {}
    for i, view in enumerate(views):
        for module in view.modules:
            if module.magnitude is not None or module.bias is not None:
                what = "a DoRA magnitude" if module.magnitude is not None else "a `lora_bias`"
                raise UnsupportedModelError(f"{view.path}: {module.name} has {what}, which no sum of updates keeps.")
            found.setdefault(module.name, {})[i] = module
    for name, modules in found.items():
        shapes = {(m.kind, m.d_out, m.A.shape[1:], len(m.B.shape)): views[i].path for i, m in modules.items()}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise ValueError(
                f"{name}: the adapters are not of one model: it is {one[0]} {one[1]} × {tuple(one[2])} in {first}, "
                f"{other[0]} {other[1]} × {tuple(other[2])} in {second}."
            )
    return found


Beside = Mapping[str, tuple[Adapter, TensorInfo]]  # tensors by key, and whose they are


def tensors_beside(views: Sequence[Adapter]) -> tuple[Beside, list[Finding]]:
    """The tensors beside the updates. Raises: ValueError where two adapters have them with different values."""
    tensors: dict[str, tuple[Adapter, TensorInfo]] = {}
    owners: dict[str, list[str]] = {}
    for view in views:
        for key, info in carried_infos(view).items():
            if key in tensors and not _same(tensors[key], (view, info)):
                raise ValueError(
                    f"{key} is trained in {owners[key][0]} and in {view.path}, with different values; whole tensors "
                    f"(modules_to_save and the like) are not merged."
                )
            tensors.setdefault(key, (view, info))
            owners.setdefault(key, []).append(view.path)
    partial = [key for key, paths in owners.items() if len(paths) < len(views)]
    findings = []
    if partial:
        message = f"{len(partial)} tensors beside the updates are in some adapters only, and are copied: {partial[0]}."
        findings.append(Finding("warning", "carried_whole", None, message))
    return tensors, findings


def _same(one: tuple[Adapter, TensorInfo], other: tuple[Adapter, TensorInfo]) -> bool:
    return one[1].shape == other[1].shape and torch.equal(finite_tensor(*one), finite_tensor(*other))


def findings_about(views: Sequence[Adapter], present: Present) -> list[Finding]:
    """The adapters' own warnings, and where they differ in base model or modules."""
    findings = [finding for view in views for finding in view.findings if finding.severity == "warning"]
    bases = {view.settings.base_model for view in views if view.settings.base_model}
    if len(bases) > 1:
        message = f"The adapters name different base models: {', '.join(sorted(bases))}."
        findings.append(Finding("warning", "base_models_differ", None, message))
    partial = [name for name, modules in present.items() if len(modules) < len(views)]
    if partial:
        message = f"{len(partial)} modules are in some adapters only, and count as 0 in the others: {partial[0]}."
        findings.append(Finding("info", "partial_modules", None, message))
    return findings


def layout_of(modules: list[AdapterModule]) -> AdapterModule:
    """A module with the layout of these, and with the widest of their dtypes."""
    first = modules[0]
    dtype = first.dtype
    for module in modules[1:]:
        dtype = torch.promote_types(dtype, module.dtype)
    return replace(first, A=replace(first.A, dtype=dtype), B=replace(first.B, dtype=dtype))


def config_of(views: Sequence[Adapter], present: Present) -> dict[str, Any]:
    """The first adapter's config, with what the others save beside their updates, and with all their modules.

    Raises: ValueError where the adapters differ in what one config cannot say.
    """
    first, *others = (dict(view.settings.raw) for view in views)
    for field in _AGREE:
        if any((raw.get(field) or "none") != (first.get(field) or "none") for raw in others):
            values = [raw.get(field) for raw in (first, *others)]
            raise ValueError(f"The adapters differ in `{field}`, which one config cannot say: {values}.")
    saved = {name for view in views for name in view.settings.modules_to_save}
    first["modules_to_save"] = sorted(saved) or None
    first["fan_in_fan_out"] = any(view.settings.fan_in_fan_out for view in views)
    same = all(len(modules) == len(views) for modules in present.values())
    same = same and all(_targets(raw) == _targets(first) for raw in others)
    pruned = any(finding.code == "pruned" for view in views for finding in view.findings)
    return first if same and not pruned else first | spelled_out(present)


def _targets(raw: Mapping[str, Any]) -> tuple[object, ...]:
    found = []
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = raw.get(field)
        found.append(frozenset(value) if isinstance(value, list | tuple | set) else value)
    return tuple(found)
