"""Whether adapters can be merged, and what their merge has beside the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.adapters import Adapter, AdapterModule, TensorInfo
from lorakit.adapters.experts import nested_paths, target_of
from lorakit.adapters.keys import tensor_name
from lorakit.adapters.lora_config import spelled_out
from lorakit.adapters.rewritable import carried_infos, finite_tensor
from lorakit.errors import Finding, UnsupportedModelError

Present = Mapping[str, Mapping[int, AdapterModule]]  # modules by name, and by the place of their adapter
Beside = Mapping[str, tuple[Adapter, TensorInfo]]  # tensors by key, and whose they are

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
                hint = " Give the base weights as `base` to merge whole updates." if module.magnitude else ""
                raise UnsupportedModelError(
                    f"{view.path}: {module.name} has {what}, which no sum of updates keeps.{hint}"
                )
            found.setdefault(module.name, {})[i] = module
    for name, modules in found.items():
        shapes = {
            (m.kind, m.d_out, m.A.shape[1:], len(m.B.shape), m.experts): views[i].path for i, m in modules.items()
        }
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise ValueError(
                f"{name}: the adapters are not of one model: it is {_shown(one)} in {first}, "
                f"{_shown(other)} in {second}."
            )
    return found


def _shown(shape: tuple[Any, ...]) -> str:
    kind, d_out, d_in, _, experts = shape
    return f"{kind} {d_out} × {tuple(d_in)}" + (f" for {experts} experts" if experts else "")


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


def layouts_of(present: Present) -> dict[str, AdapterModule]:
    """For each module one with the layout of all adapters' and with the widest of their dtypes.

    Raises: UnsupportedModelError where adapters adapt different parameters of one module, and PEFT's order is unknown.
    """
    layouts = {name: _layout_of(list(modules.values())) for name, modules in present.items()}
    try:
        paths = nested_paths({name: module.path for name, module in layouts.items() if module.experts is not None})
    except KeyError as error:
        raise UnsupportedModelError(
            f"{error.args[0]!r} is adapted beside other parameters of its module, and the order in which PEFT nests "
            f"them is not known for this name. Merge adapters of the same parameters."
        ) from None
    for name, path in paths.items():
        first = layouts[name]
        A, B = replace(first.A, key=tensor_name(path, "A")), replace(first.B, key=tensor_name(path, "B"))
        layouts[name] = replace(first, A=A, B=B)
    return layouts


def _layout_of(modules: list[AdapterModule]) -> AdapterModule:
    first = modules[0].stored
    dtype = first.dtype
    for module in modules[1:]:
        dtype = torch.promote_types(dtype, module.stored.dtype)
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
    if same and not pruned:
        return first
    stacks = {name: m.path for name, modules in present.items() for m in modules.values() if m.experts is not None}
    spelled = spelled_out(present.keys() - stacks.keys(), (target_of(*item) for item in stacks.items()))
    if len({frozenset(raw.get("target_parameters") or ()) for raw in (first, *others)}) == 1:
        spelled["target_parameters"] = first.get("target_parameters")
    return first | spelled


def _targets(raw: Mapping[str, Any]) -> tuple[object, ...]:
    found = []
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"):
        value = raw.get(field)
        found.append(frozenset(value) if isinstance(value, list | tuple | set) else value)
    return tuple(found)
