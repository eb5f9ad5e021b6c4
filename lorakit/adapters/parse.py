"""Group an adapter's tensors into modules, and find out what is missing or does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.adapters.adapter import Adapter, AdapterModule, ExtraKind, ExtraTensor, Kind, TensorInfo, TensorSource
from lorakit.adapters.config import AdapterSettings, ModuleConfig
from lorakit.adapters.experts import parameters_of
from lorakit.adapters.keys import Part, mask_mode, module_path, parse_key, without_prefix
from lorakit.errors import AdapterFileError, Finding
from lorakit.naming.roles import layer_of, role_of

# Last name components of token embeddings and output heads, which PEFT saves whole if an adapter targets them.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings")


@dataclass
class _Group:
    """The tensors of one module, by part; a part with several tensors is an error."""

    parts: dict[Part, list[TensorInfo]] = field(default_factory=dict)
    embedding: bool = False
    parameter: bool = False  # adapted under `target_parameters`


def assemble(path: str, settings: AdapterSettings, source: TensorSource) -> Adapter:
    """The adapter made of the tensors of `source`; what is wrong with it is among its findings.

    Raises: AdapterFileError if no tensor belongs to a low-rank update.
    """
    groups, others = _grouped(source)
    if not groups:
        named = ", ".join(repr(info.key) for info in others[:2]) + (", …" if len(others) > 2 else "")
        found = f"there are {named}." if others else "there are none at all."
        raise AdapterFileError(f"{path}: no tensor is named like a LoRA's (lora_A, lora_B, …); {found}")
    parameters = parameters_of(groups, settings.raw, settings.target_parameters)
    groups = {parameters.get(path, path): _of_parameter(group, path in parameters) for path, group in groups.items()}
    resolved = settings.resolve(groups)
    extras = [ExtraTensor(info, _kind_of_extra(info, settings)) for info in others]
    modules: list[AdapterModule] = []
    findings: list[Finding] = []
    for name in sorted(groups, key=_natural):
        group = groups[name]
        problem = _problem(group, resolved.modules[name], settings)
        if problem is not None:
            code, message = problem
            findings.append(Finding("info" if code == "pruned" else "error", code, name, f"{name}: {message}"))
        if problem is None or code == "rank_mismatch":
            modules.append(_module(name, group, resolved.modules[name], settings))
    findings += _findings_about_all(settings, resolved.unmatched, extras)
    return Adapter(path, settings, tuple(modules), tuple(extras), tuple(findings), source)


def _grouped(source: TensorSource) -> tuple[dict[str, _Group], list[TensorInfo]]:
    """The tensors of low-rank updates by module, and all others."""
    groups: dict[str, _Group] = {}
    others: list[TensorInfo] = []
    for info in source.infos().values():
        key = parse_key(info.key)
        if key is None:
            others.append(info)
            continue
        group = groups.setdefault(key.module_name, _Group())
        group.parts.setdefault(key.part, []).append(info)
        group.embedding |= key.embedding
    return groups, others


def _of_parameter(group: _Group, parameter: bool) -> _Group:
    group.parameter = parameter
    return group


def _module(name: str, group: _Group, config: ModuleConfig, settings: AdapterSettings) -> AdapterModule:
    one: dict[str, Any] = {part: infos[0] for part, infos in group.parts.items()}  # one TensorInfo a part
    experts = one["A"].shape[0] // (config.rank or 1) if group.parameter else None
    if experts == 1 and name == module_path(one["A"].key):  # a module's own `weight`, of two dimensions
        experts = None
    kind: Kind = "embedding" if group.embedding else "conv" if len(one["A"].shape) > 2 else "linear"
    return AdapterModule(
        name=name,
        kind=kind if experts is None else "experts",
        experts=experts,
        scaling=config.scaling,
        role=role_of(name),
        layer=layer_of(name),
        fan_in_fan_out=settings.fan_in_fan_out,
        **one,
    )


def _problem(group: _Group, config: ModuleConfig, settings: AdapterSettings) -> tuple[str, str] | None:
    """The first thing that is wrong with a module, as code and message; None for a sound one.

    With a `rank_mismatch` there is a module still; with any other problem there is none.
    """
    for infos in group.parts.values():
        if len(infos) > 1:
            keys = " and ".join(repr(info.key) for info in infos)
            return "duplicate_tensor", f"{keys} are the same part of one module; remove all but one of them."
    one = {part: infos[0] for part, infos in group.parts.items()}
    needed: tuple[Part, ...] = ("A", "B", "E") if settings.peft_type == "ADALORA" else ("A", "B")
    missing = [part for part in needed if part not in one]
    if missing:
        found = ", ".join(sorted(one))
        return "missing_half", f"lora_{' and lora_'.join(missing)} is missing; found {found}."
    if not _shapes_fit(one):
        shapes = ", ".join(f"{part} {info.shape}" for part, info in one.items())
        return "shape_mismatch", f"the shapes do not fit together: {shapes}."
    for info in one.values():
        if info.dtype is None or not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            dtype = info.dtype or "of a dtype that torch lacks"
            return "unsupported_dtype", f"{info.key} is {dtype}; it must be float16, bfloat16, float32 or float64."
    mode = settings.raw.get("mode", "hadamard")
    if "mask" in one and settings.peft_type == "SPECLORA" and mask_mode(one["mask"].key) != mode:
        return "mode_mismatch", f"{one['mask'].key} is of another mode than the config's `mode`, {mode!r}."
    rank = one["A"].shape[0]
    if rank == 0:
        if config.rank == 0:
            return "pruned", "AdaLoRA pruned it to rank 0."
        return "rank_zero", "the factors have rank 0."
    if group.parameter and config.rank is not None:
        if len(one["A"].shape) != 2 or len(one["B"].shape) != 2 or rank % config.rank:
            shapes = f"A {one['A'].shape} and B {one['B'].shape}"
            return "shape_mismatch", f"{shapes} are not the factors of experts of the config's rank {config.rank}."
        return None
    if config.rank not in (None, rank):
        return "rank_mismatch", f"the factors have rank {rank}, but the config says {config.rank}."
    return None


def _shapes_fit(one: dict[Part, TensorInfo]) -> bool:
    """Whether B A is defined, of at most five dimensions, and bias and E fit it.

    A is (rank, d_in, *kernel), B is (d_out, rank / groups, 1, …, 1), with groups > 1 for convolutions only.
    """
    A, B = one["A"].shape, one["B"].shape
    if not 2 <= len(A) <= 5 or len(B) < 2 or not all((*A[1:], B[0])):
        return False
    groups = A[0] // B[1] if B[1] else 1
    if A[0] != groups * B[1] or any(size != 1 for size in B[2:]):
        return False
    if groups != 1 and not (groups > 1 and len(A) > 2 and len(A) == len(B) and B[0] % groups == 0):
        return False
    expected: dict[Part, tuple[int, ...]] = {"bias": B[:1], "E": (A[0], 1)}
    return all(one[part].shape == shape for part, shape in expected.items() if part in one)


def _kind_of_extra(info: TensorInfo, settings: AdapterSettings) -> ExtraKind:
    name = without_prefix(info.key)
    module, _, leaf = name.rpartition(".")
    steps = module.split(".")
    ancestors = [".".join(steps[: i + 1]) for i in range(len(steps))]
    if any(ancestor.endswith(saved) for ancestor in ancestors for saved in settings.modules_to_save if saved):
        return "modules_to_save"
    if "trainable_tokens" in name or "token_adapter" in steps:
        return "trainable_tokens"
    if leaf == "bias" and settings.raw.get("bias", "none") != "none":
        return "bias"
    if leaf == "weight" and module.removesuffix(".base_layer").rpartition(".")[2] in _EMBEDDINGS:
        return "embedding"
    return "orphan"


def _findings_about_all(
    settings: AdapterSettings, unmatched: Sequence[tuple[str, str]], extras: Sequence[ExtraTensor]
) -> Iterator[Finding]:
    """Findings about the config and about the tensors beside the updates."""
    if settings.r is None:
        message = (
            "There is no adapter_config.json beside the file: scalings are unknown and taken as 1, which changes norms "
            "but no rank."
        )
        yield Finding("warning", "no_config", None, message)
    for pattern, key in unmatched:
        yield Finding("error", "pattern_unmatched", None, f"`{pattern}` has {key!r}, which matches no module.")
    if settings.changes_base:
        message = (
            f"The adapter was initialized with init_lora_weights={settings.init!r}, which changes the base weights. "
            "Unless it was converted when it was saved, its updates belong to the changed weights, not to the original "
            "ones."
        )
        yield Finding("warning", "base_changed", None, message)
    kinds: dict[ExtraKind, list[TensorInfo]] = {}
    for extra in extras:
        kinds.setdefault(extra.kind, []).append(extra.info)
    for kind, infos in kinds.items():
        yield from _findings_about_extras(kind, infos)


def _findings_about_extras(kind: ExtraKind, infos: Sequence[TensorInfo]) -> Iterator[Finding]:
    if kind == "orphan":
        for info in infos:
            message = f"{info.key} belongs to no update, and to nothing else that PEFT saves."
            yield Finding("warning", "orphan_tensor", without_prefix(info.key), message)
    else:
        size = sum(info.numel for info in infos)
        message = f"{len(infos)} tensors ({kind}) with {size:,} parameters are saved beside the updates."
        yield Finding("info", f"beside_{kind}", None, message)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(step), "") if step.isdecimal() and len(step) < 19 else (-1, step) for step in name.split(".")]
