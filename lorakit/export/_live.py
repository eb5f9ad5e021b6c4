"""The updates of an adapter in a model, masks included, in the layout in which PEFT stores them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lorakit.adapters.in_model import LiveModule
from lorakit.adapters.keys import parse_key, tensor_name
from lorakit.adapters.write_lora import PlainLora, StoredUpdate
from lorakit.errors import ExportError, Finding
from lorakit.export._masks import check_mask, has_mask, mask_update
from lorakit.naming.inits import changes_base_weights
from lorakit.serving._profiles import vllm_max_lora_rank
from lorakit.serving._written import Before
from lorakit.spectral import LowRank


@dataclass(frozen=True, eq=False)
class LiveUpdate:
    """One module's update, a mask's part of it included; energies and spectrum are there where it may be cut."""

    module: LiveModule
    stored: StoredUpdate
    singular_values: Tensor | None = None
    discarded: float = 0.0
    energy: float = 0.0


def check(config: LoraConfig, modules: Sequence[LiveModule], rank: object) -> None:
    """Raise ExportError where no plain LoRA means the same as the adapter, or `rank` cannot cut a module."""
    init = config.init_lora_weights
    if changes_base_weights(init):
        raise ExportError(
            f"The adapter was made with init_lora_weights={init!r}, which changed the base weights; its factors mean "
            f"nothing to the original ones. "
            + (
                "No plain LoRA of the original weight can say what SpecLoRA's mask rescales; use merge_and_unload()."
                if config.peft_type == PeftType.SPECLORA
                else "Use save_pretrained with `path_initial_model_for_weight_conversion`."
            )
        )
    for module in modules:
        check_mask(module)
        special = module.layer.use_dora.get(module.adapter_name) or module.adapter_name in module.layer.lora_variant
        if rank is not None and (special or not _can_be_cut(module)):
            kind = "a LoRA variant" if special else f"a {type(module.layer).__name__} layer"
            raise ExportError(f"{module.name!r} is {kind}, which `rank` cannot truncate; leave `rank` out.")


def saved_tensors(model: PeftModel, adapter_name: str, modules: Sequence[LiveModule]) -> dict[str, Tensor]:
    """The tensors that PEFT would save. Raises: ExportError where a base weight among them has an adapter merged."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for module in modules:
        if module.layer.merged and f"base_model.model.{module.name}.base_layer.weight" in tensors:
            raise ExportError(
                f"{module.name!r} is an adapted embedding, whose base weight PEFT writes beside the adapter, and "
                f"{module.layer.merged_adapters} are merged into it; call unmerge_adapter() first."
            )
    return tensors


def contents_of(config: LoraConfig, tensors: Collection[str]) -> set[str]:
    """What the adapter has beside low-rank updates that servers refuse."""
    found = set()
    if config.target_parameters:
        found.add("stacked experts")
    if config.modules_to_save:
        found.add("modules_to_save")
    for key in map(parse_key, tensors):
        if key is not None and key.part == "magnitude":
            found.add("DoRA")
        if key is not None and key.part == "bias":
            found.add("lora_bias")
    return found


def before_export(modules: Sequence[LiveModule], tensors: Mapping[str, Tensor]) -> Before:
    """Sizes of the adapter as PEFT would save it; with a mask, no server serves it."""
    return Before(
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if parse_key(key) is not None),
        size_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        rank=max((own_rank(module) for module in modules), default=1),
        served=not any(has_mask(module) for module in modules),
    )


@torch.no_grad()
def whole_updates(modules: Sequence[LiveModule], tensors: Mapping[str, Tensor], *, cut: bool) -> list[LiveUpdate]:
    """The updates of all modules, uncut; with `cut`, with their spectra."""
    updates = []
    for module in modules:
        if not _can_be_cut(module):
            updates.append(LiveUpdate(module, _as_it_is(module, tensors)))
            continue
        update = module.factors()
        if has_mask(module):
            A, B = mask_update(module, update.dtype)
            B = B.expand(*A.shape[:-2], -1, -1)
            scaling = module.scaling or 1.0  # the mask is not scaled; the low-rank part vanishes where its scaling is 0
            own = update if module.scaling else LowRank(torch.zeros_like(update.B), update.A, scaling)
            update = LowRank.sum([own, LowRank(B / scaling, A, scaling)])
        stored = _stored(module, tensors, update.A, update.B, float(update.scaling))
        sigma = update.singular_values().double() if cut else None
        energy = 0.0 if sigma is None else float(sigma.square().sum())
        updates.append(LiveUpdate(module, stored, sigma, 0.0, energy))
    return updates


@torch.no_grad()
def cut_updates(updates: Sequence[LiveUpdate], rank: int) -> list[LiveUpdate]:
    """The best updates of at most this rank."""
    found = []
    for update in updates:
        stored, sigma = update.stored, update.singular_values
        assert sigma is not None
        if rank < stored.rank:
            best = LowRank(stored.B, stored.A, stored.scaling).truncate(rank)
            stored = replace(stored, A=best.A, B=best.B)
        found.append(replace(update, stored=stored, discarded=float(sigma[..., rank:].square().sum())))
    return found


def check_variants(updates: Sequence[LiveUpdate], lora: PlainLora, beside: Collection[str]) -> None:
    """Raise ExportError where a module is padded whose variant of LoRA has more tensors, of the rank's size."""
    if lora.rank_pattern:
        return
    unknown = [key for key in beside if ".lora_" in key and parse_key(key) is None]
    for update in updates:
        start = f"base_model.model.{update.stored.name}.lora_"
        others = [key for key in unknown if key.startswith(start)] if update.stored.rank != lora.r else []
        if others:
            raise ExportError(
                f"{update.stored.name!r} has {others[0]!r}, which cannot be padded to rank {lora.r}; use `pad=False` "
                f"(--compact), for PEFT alone."
            )


def about_masks(modules: Sequence[LiveModule], updates: Sequence[LiveUpdate], lora: PlainLora) -> list[Finding]:
    """A finding where the rank r + k of a mask's export exceeds a module's smaller side."""
    beyond = []
    for module, update in zip(modules, updates, strict=True):
        side = _smaller_side(update.stored)
        layer: Any = module.layer
        together = own_rank(module) + layer.lora_spec[module.adapter_name].k if has_mask(module) else 0
        if together > side:
            beyond.append((module.name, together, side))
    if not beyond:
        return []
    name, together, side = beyond[0]
    needed = max(min(update.stored.rank, _smaller_side(update.stored)) for update in updates)
    served = vllm_max_lora_rank(lora.r)
    way_out = f"`rank={needed}` loses nothing." if needed < lora.r else "A lower `rank`, or 'auto', makes it smaller."
    message = (
        f"r + k exceeds the smaller side of {len(beyond)} weights, such as {name} (r + k = {together}, smaller side "
        f"{side}), whose updates need no more rank than that. The file has rank {lora.r}; "
        + (f"vLLM needs --max-lora-rank {served}. " if served else "vLLM serves ranks up to 512 only. ")
        + way_out
    )
    return [Finding("warning", "rank_exceeds_side", None, message)]


def _smaller_side(stored: StoredUpdate) -> int:
    if stored.experts is not None:
        return min(stored.B.shape[1], stored.A.shape[2])
    return min(stored.B.shape[0], stored.A[0].numel())


def _can_be_cut(module: LiveModule) -> bool:
    """Whether the update is one matrix for each expert, or one."""
    return module.is_linear() or module.experts is not None


def own_rank(module: LiveModule) -> int:
    """The rank of the adapter's own factors in this module, without a mask."""
    layer: Any = module.layer
    return int(layer.r[module.adapter_name])


def _as_it_is(module: LiveModule, tensors: Mapping[str, Tensor]) -> StoredUpdate:
    """An embedding's, a convolution's or an attention's factors, with a mask as k more ranks."""
    embedding = module.adapter_name in module.layer.lora_embedding_A
    A, B = (tensors[tensor_name(module.path, half, embedding)] for half in ("A", "B"))
    if not has_mask(module):
        return _stored(module, tensors, A, B, module.scaling)
    scaling = module.scaling or 1.0
    rows, picks = mask_update(module, A.dtype)
    picks = (picks / scaling).reshape(*picks.shape, *[1] * (B.dim() - 2))
    own = B if module.scaling else torch.zeros_like(B)
    return _stored(
        module, tensors, torch.cat([A.to(rows.dtype), rows]), torch.cat([own.to(picks.dtype), picks], 1), scaling
    )


def _stored(module: LiveModule, tensors: Mapping[str, Tensor], A: Tensor, B: Tensor, scaling: float) -> StoredUpdate:
    embedding = module.adapter_name in module.layer.lora_embedding_A
    A_key, B_key = (tensor_name(module.path, half, embedding) for half in ("A", "B"))
    return StoredUpdate(
        name=module.name,
        A=A,
        B=B,
        scaling=scaling,
        A_dtype=tensors[A_key].dtype,
        B_dtype=tensors[B_key].dtype,
        A_key=A_key,
        B_key=B_key,
        groups=1 if embedding or module.experts is not None else A.shape[0] // B.shape[1],
        bias=tensors.get(tensor_name(module.path, "bias")),
        experts=module.experts,
    )
