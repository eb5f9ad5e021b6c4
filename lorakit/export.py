"""Any of lorakit's adapters as a plain LoRA, which PEFT loads without lorakit and servers serve."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import MontecloraLinearVariant
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lorakit.adapters import open_adapter
from lorakit.adapters.atomic import replaced_directory, write_adapter
from lorakit.adapters.edit_log import edits_of, write_record
from lorakit.adapters.in_model import LiveModule, live_modules, resolve_adapter_name
from lorakit.adapters.write_lora import common_scaling, plain_fields
from lorakit.compress import truncate
from lorakit.errors import ExportError
from lorakit.naming.inits import changes_base_weights
from lorakit.spectral import LowRank
from lorakit.tuners._layers import SpecLoRAOutProjection
from lorakit.tuners._variants import MaskInMerge


@dataclass(frozen=True)
class ExportedModule:
    """One module of an export; `discarded_energy` is the share of ‖ΔW‖_F² that the truncation left out."""

    module_name: str
    rank: int
    source_rank: int
    discarded_energy: float


@dataclass(frozen=True)
class ExportReport:
    """What `to_lora` wrote; `discarded_energy` is the share of Σ ‖ΔW‖_F² that is not in the files."""

    path: str
    r: int
    lora_alpha: float
    parameters: int
    discarded_energy: float
    modules: list[ExportedModule]

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"modules": [vars(m) for m in self.modules]}


def to_lora(
    adapter: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    adapter_name: str | None = None,
) -> ExportReport:
    """Write an adapter, of a PeftModel or at rest, as a vanilla LORA checkpoint; the model is not changed.

    FISHERLORA and LORA keep their tensors. SPECLORA's mask is itself an update of rank ≤ k, so the whole is written
    exactly at its own rank, at most r + k, a module. With `rank` every module is cut to at most that, optimally
    (Eckart–Young), and the report has the share of the energy that was left out.

    Every module has the same scaling α/r, also where ranks differ, and rsLoRA is rewritten as plain scaling: a server
    that reads only `r` and `lora_alpha` and ignores the patterns applies the same update. `r` is the largest rank.

    Args:
        adapter: a PeftModel, `adapter_name` saying which of its adapters, if not the active one; or a directory, a file
            or a Hub id, unless it is a SPECLORA, whose mask is an update of the base weight.
        out: a directory, made if need be; the adapter's files in it are replaced, and only if all goes well.
    Raises: ExportError (a ValueError) for what no plain LoRA can say; ValueError for a bad `rank`; of adapters at rest
        also what `lorakit.compress.truncate` raises.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be a positive integer or None; got {rank!r}.")
    if isinstance(adapter, str | os.PathLike):
        return _at_rest(adapter, out, rank, adapter_name)
    adapter_name = resolve_adapter_name(adapter, adapter_name)
    config = adapter.peft_config[adapter_name]
    modules = live_modules(adapter, adapter_name)
    _check(config, modules, rank)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(adapter, adapter_name=adapter_name)
    for key in [key for key in tensors if ".lora_spec." in key]:
        del tensors[key]
    for module in modules:
        if module.layer.merged and f"base_model.model.{module.name}.base_layer.weight" in tensors:
            raise ExportError(
                f"{module.name!r} is an adapted embedding, whose base weight PEFT writes beside the adapter, and "
                f"{module.layer.merged_adapters} are merged into it; call unmerge_adapter() first."
            )

    common = common_scaling(module.scaling for module in modules)
    exported, discarded, energy = [], 0.0, 0.0
    for module in modules:
        if not module.is_linear():
            exported.append(_write_as_it_is(tensors, module, common))
            continue
        factors, left_out, total = _as_low_rank(module, rank)
        exported.append(ExportedModule(module.name, factors.rank, module.rank, left_out / total if total > 0 else 0.0))
        discarded, energy = discarded + left_out, energy + total
        key = f"base_model.model.{module.name}"
        dtype = tensors[f"{key}.lora_B.weight"].dtype
        ratio = float(factors.scaling) / common
        tensors[f"{key}.lora_A.weight"] = factors.A.to(dtype)
        tensors[f"{key}.lora_B.weight"] = (factors.B if ratio == 1 else factors.B * ratio).to(dtype)
        bias = f"{key}.lora_B.bias"
        if bias in tensors and module.scaling != common:
            tensors[bias] = (tensors[bias] * (module.scaling / common)).to(tensors[bias].dtype)

    plain = _plain_config(config, exported, common)
    with replaced_directory(out) as directory:
        write_adapter(directory, tensors, plain)
        write_record(directory, config)
    if not edits_of(config):
        write_record(out, config)  # an old one is not of this adapter
    return ExportReport(
        path=os.fspath(out),
        r=plain.r,
        lora_alpha=plain.lora_alpha,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        discarded_energy=discarded / energy if energy > 0 else 0.0,
        modules=exported,
    )


def _at_rest(
    adapter: str | os.PathLike[str], out: str | os.PathLike[str], rank: int | None, adapter_name: str | None
) -> ExportReport:
    view = open_adapter(adapter, adapter_name=adapter_name)
    if view.settings.peft_type == "SPECLORA":
        raise ExportError(
            f"{view.path} is a SPECLORA adapter, whose mask is an update of the base weight: load it into its model, "
            f"and export that (`lorakit export --base MODEL`)."
        )
    if rank is not None and any(module.magnitude is not None for module in view.modules):
        raise ExportError(f"{view.path} has DoRA magnitudes, which `rank` cannot truncate; leave `rank` out.")
    largest = max((module.rank for module in view.modules), default=1)
    report = truncate(adapter, out, max_rank=largest if rank is None else rank)
    return ExportReport(
        path=report.path,
        r=report.r,
        lora_alpha=report.lora_alpha,
        parameters=report.parameters + report.parameters_beside,
        discarded_energy=1 - report.energy_kept,
        modules=[ExportedModule(m.module_name, m.kept_rank, m.rank, 1 - m.energy_kept) for m in report.modules],
    )


def _check(config: LoraConfig, modules: list[LiveModule], rank: int | None) -> None:
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
        _check_mask(module)
        if isinstance(module.layer, ParamWrapper):
            raise ExportError(
                f"{module.name!r} adapts parameters (`target_parameters`), which to_lora does not write yet; a LORA "
                f"adapter can be written with save_pretrained."
            )
        special = module.layer.use_dora.get(module.adapter_name) or module.adapter_name in module.layer.lora_variant
        if rank is not None and (special or not module.is_linear()):
            kind = "a LoRA variant" if special else f"a {type(module.layer).__name__} layer"
            raise ExportError(f"{module.name!r} is {kind}, which `rank` cannot truncate; leave `rank` out.")


def _check_mask(module: LiveModule) -> None:
    """Refuse a mask where PEFT's layer would not compute what the mask's update, as k ranks more of LoRA, means."""
    layer: Any = module.layer
    if module.adapter_name not in getattr(layer, "lora_spec", {}):
        return
    base = layer.get_base_layer()
    variant = layer.lora_variant.get(module.adapter_name)
    reason = None
    if isinstance(layer, MultiheadAttention | SpecLoRAOutProjection):
        reason = "is an attention layer, where PEFT's plain LoRA adds the output projection's update twice"
    elif getattr(base, "padding_mode", "zeros") != "zeros" or any(step != 1 for step in getattr(base, "dilation", ())):
        reason = "pads or dilates as PEFT's plain LoRA of a convolution does not"
    elif isinstance(variant, MaskInMerge | MontecloraLinearVariant):
        name = type(variant).__name__.replace("Masked", "")
        reason = f"uses {name.removesuffix('LinearVariant')}, whose tensors take no ranks more"
    if reason is not None:
        raise ExportError(
            f"{module.name!r} {reason}, so that SpecLoRA's mask cannot be written; use merge_and_unload()."
        )


@torch.no_grad()
def _as_low_rank(module: LiveModule, rank: int | None) -> tuple[LowRank, float, float]:
    """The module's whole update, cut to `rank`; the energy ‖ΔW‖_F² left out, and all of it (0 where nothing is cut)."""
    factors = module.factors()
    layer: Any = module.layer
    if module.adapter_name in getattr(layer, "lora_spec", {}):
        A, B = _mask_update(layer, module.adapter_name, factors.dtype)
        factors = LowRank.sum([factors.to(dtype=A.dtype), LowRank(B, A)])
    if rank is None:
        return factors, 0.0, 0.0
    energies = factors.singular_values().double() ** 2
    discarded, total = float(energies[rank:].sum()), float(energies.sum())
    return (factors.truncate(rank) if rank < factors.rank else factors), discarded, total


def _mask_update(layer: Any, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mask's own update, (d − 1)[:, None] ⊙ P in its place, as factors of rank k: rows picked by B.

    A is (k, d_in), of a convolution (k, d_in, *kernel), and B (d_out, k).
    """
    rows = layer.mask_rows(adapter_name, dtype=torch.promote_types(dtype, torch.float32))
    return layer.over_all_columns(adapter_name, rows), layer.row_selection(adapter_name, rows)


@torch.no_grad()
def _write_as_it_is(tensors: dict[str, Tensor], module: LiveModule, common: float) -> ExportedModule:
    """Put an embedding's or a convolution's factors, at the common scaling, into `tensors`, a mask as k ranks more."""
    layer: Any = module.layer
    name, key = module.adapter_name, f"base_model.model.{module.name}"
    is_embedding = name in layer.lora_embedding_A
    a, b = (f"{key}.lora_embedding_{x}" if is_embedding else f"{key}.lora_{x}.weight" for x in "AB")
    A, B, rank = tensors[a], tensors[b], layer.r[name]
    ratio = module.scaling / common
    if ratio != 1:
        B = (B * ratio).to(B.dtype)
        if f"{key}.lora_B.bias" in tensors:
            tensors[f"{key}.lora_B.bias"] = tensors[f"{key}.lora_B.bias"] * ratio
    if name in getattr(layer, "lora_spec", {}):
        rows, picks = _mask_update(layer, name, A.dtype)
        picks = (picks / common).reshape(*picks.shape, *[1] * (B.dim() - 2))
        A, B = torch.cat([A, rows.to(A.dtype)]), torch.cat([B, picks.to(B.dtype)], dim=1)
        rank = A.shape[0]
    tensors[a], tensors[b] = A, B
    return ExportedModule(module.name, rank, rank, 0.0)


def _plain_config(config: LoraConfig, modules: list[ExportedModule], scaling: float) -> LoraConfig:
    ranks = {module.module_name: module.rank for module in modules}
    values = {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(LoraConfig) if f.init}
    return LoraConfig(**values | {"peft_type": None, **plain_fields(ranks, scaling)})
