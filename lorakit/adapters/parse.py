"""From the tensors and the config of an adapter to the view of it: what belongs together, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorakit.adapters.adapter import Adapter, AdapterModule, ExtraKind, ExtraTensor, TensorInfo, TensorSource
from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.keys import Part, parse_key, without_prefix
from lorakit.errors import AdapterFileError, Finding

# Last components of the names of token embeddings and output heads, which PEFT saves beside an adapter of them.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings")


def assemble(path: str, settings: AdapterSettings, source: TensorSource) -> Adapter:
    """The view over the tensors of `source`.

    Raises: AdapterFileError where there is no tensor of a low-rank update at all.
    """
    parts: dict[str, dict[Part, list[TensorInfo]]] = {}
    embeddings: set[str] = set()
    others: list[TensorInfo] = []
    for info in source.infos().values():
        key = parse_key(info.key)
        if key is None:
            others.append(info)
            continue
        parts.setdefault(key.module_name, {}).setdefault(key.part, []).append(info)
        if key.embedding:
            embeddings.add(key.module_name)
    if not parts:
        some = ", ".join(repr(info.key) for info in others[:2])
        raise AdapterFileError(
            f"{path}: no tensor is named like a LoRA's (lora_A, lora_B, …); "
            + (f"there are {some}{', …' if len(others) > 2 else ''}." if some else "there are none at all.")
        )
    modules: list[AdapterModule] = []
    findings: list[Finding] = []
    extras = [ExtraTensor(info, _kind_of_extra(info, settings)) for info in others]
    for name in sorted(parts, key=_natural):
        if _adapts_parameters(name, settings):
            extras += [ExtraTensor(info, "expert_parameters") for infos in parts[name].values() for info in infos]
            continue
        module = _module(name, parts[name], name in embeddings, settings, findings)
        if module is not None:
            modules.append(module)
    findings += _about_the_whole(settings, list(parts), extras)
    return Adapter(path, settings, tuple(modules), tuple(extras), tuple(findings), source)


def _module(
    name: str,
    parts: dict[Part, list[TensorInfo]],
    embedding: bool,
    settings: AdapterSettings,
    findings: list[Finding],
) -> AdapterModule | None:
    """The module, or None and findings that say why there is none."""

    def error(code: str, message: str) -> None:
        findings.append(Finding("error", code, name, message))

    for infos in parts.values():
        if len(infos) > 1:
            keys = " and ".join(repr(info.key) for info in infos)
            error("duplicate_tensor", f"{name}: {keys} are the same part of one module; which of them is meant?")
            return None
    one: dict[Part, TensorInfo] = {part: infos[0] for part, infos in parts.items()}
    missing = [part for part in ("A", "B") if part not in one]
    if settings.peft_type == "ADALORA" and "E" not in one:
        missing.append("E")
    if missing:
        there = ", ".join(sorted(one))
        error("missing_half", f"{name}: lora_{' and lora_'.join(missing)} is missing; there is {there}.")
        return None
    A, B = one["A"], one["B"]
    fits = len(A.shape) >= 2 and len(B.shape) >= 2 and all((*A.shape[1:], B.shape[0]))
    groups = A.shape[0] // B.shape[1] if fits and B.shape[1] else 1
    fits = fits and A.shape[0] == groups * B.shape[1] and all(size == 1 for size in B.shape[2:])
    if fits and groups != 1:  # a grouped convolution
        fits = groups > 1 and len(A.shape) > 2 and len(A.shape) == len(B.shape) and B.shape[0] % groups == 0
    beside: dict[Part, tuple[int, ...]] = {"bias": B.shape[:1], "E": (*A.shape[:1], 1)}
    wrong = [part for part, shape in beside.items() if part in one and one[part].shape != shape]
    if not fits or len(A.shape) > 5 or wrong:
        shapes = ", ".join(f"{part} {info.shape}" for part, info in one.items())
        error("shape_mismatch", f"{name}: the shapes do not belong together: {shapes}.")
        return None
    floating = [info for info in one.values() if info.dtype is None or not info.dtype.is_floating_point]
    floating += [info for info in one.values() if info.dtype is not None and info.dtype.itemsize < 2]
    if floating:
        dtype = floating[0].dtype or "a dtype that torch lacks"
        error("unsupported_dtype", f"{name}: {floating[0].key} is {dtype}; float16, bfloat16, 32 and 64 can be read.")
        return None
    rank = A.shape[0]
    configured = settings.rank_of(name)
    if rank == 0:
        if configured == 0:
            findings.append(Finding("info", "pruned", name, f"{name}: AdaLoRA pruned it to rank 0."))
        else:
            error("rank_zero", f"{name}: the factors have rank 0.")
        return None
    if configured is not None and configured != rank:
        error("rank_mismatch", f"{name}: the factors have rank {rank}, the config says {configured}.")
    return AdapterModule(
        name=name,
        kind="embedding" if embedding else "conv" if len(A.shape) > 2 else "linear",
        scaling=settings.scaling_of(name, rank),
        fan_in_fan_out=settings.fan_in_fan_out,
        **_fields(one),
    )


def _fields(parts: dict[Part, TensorInfo]) -> dict[str, Any]:
    return {str(part): info for part, info in parts.items()}


def _kind_of_extra(info: TensorInfo, settings: AdapterSettings) -> ExtraKind:
    name = without_prefix(info.key)
    module, _, leaf = name.rpartition(".")
    steps = module.split(".")
    ancestors = [".".join(steps[: i + 1]) for i in range(len(steps))]
    if any(a.endswith(saved) for a in ancestors for saved in settings.modules_to_save if saved):
        return "modules_to_save"
    if "trainable_tokens" in name or "token_adapter" in steps:
        return "trainable_tokens"
    if leaf == "bias" and settings.raw.get("bias", "none") != "none":
        return "bias"
    if leaf == "weight" and module.removesuffix(".base_layer").rpartition(".")[2] in _EMBEDDINGS:
        return "embedding"
    return "orphan"


def _adapts_parameters(name: str, settings: AdapterSettings) -> bool:
    """Whether a module's factors are those of a parameter of it (`target_parameters`), stacked over experts."""
    module = name.removesuffix(".base_layer")
    parents = {parameter.rpartition(".")[0] for parameter in settings.target_parameters}
    return any(module == parent or module.endswith(f".{parent}") for parent in parents)


def _about_the_whole(settings: AdapterSettings, names: list[str], extras: list[ExtraTensor]) -> Iterable[Finding]:
    if settings.r is None:
        yield Finding(
            "warning",
            "no_config",
            None,
            "There is no adapter_config.json beside the file: scalings are unknown and taken as 1, which changes norms "
            "but no rank.",
        )
    for pattern, key in settings.unmatched_patterns(names):
        yield Finding("error", "pattern_unmatched", None, f"`{pattern}` has {key!r}, which matches no module.")
    if settings.changes_base:
        yield Finding(
            "warning",
            "base_changed",
            None,
            f"The adapter was made with init_lora_weights={settings.init!r}, which changed the base weights: unless it "
            f"was converted when it was saved, its updates are not of the original ones.",
        )
    kinds = {extra.kind: [e.info for e in extras if e.kind == extra.kind] for extra in extras}
    for kind, infos in kinds.items():
        if kind == "orphan":
            for info in infos:
                name = without_prefix(info.key)
                yield Finding("warning", "orphan_tensor", name, f"{info.key} belongs to nothing that is known.")
        elif kind == "expert_parameters":
            yield Finding(
                "warning",
                "not_covered",
                None,
                f"{len(infos)} tensors adapt parameters (`target_parameters`), which is not covered: {infos[0].key}, …",
            )
        else:
            size = sum(info.numel for info in infos)
            message = f"{len(infos)} tensors beside the updates ({kind}), {size:,} parameters."
            yield Finding("info", f"beside_{kind}", None, message)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(step), "") if step.isdecimal() and len(step) < 19 else (-1, step) for step in name.split(".")]
