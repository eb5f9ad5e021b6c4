"""Adapters of lower rank: the best one, module by module, under ranks, an energy, or a budget."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit.adapters import Adapter, AdapterModule, TensorInfo, open_saved_adapter
from lorakit.adapters.edit_log import edits_of, read_edits
from lorakit.adapters.keys import tensor_name
from lorakit.adapters.write_lora import (
    WrittenReport,
    carried_tensors,
    check_finite,
    check_rewritable,
    common_scaling,
    factor_tensors,
    plain_config,
    write_plain,
)
from lorakit.allocation.budget import read_budget
from lorakit.allocation.rules import allocate
from lorakit.errors import AdapterFileError, Finding
from lorakit.naming.patterns import lookup, unmatched_keys
from lorakit.naming.roles import Role
from lorakit.spectral import LowRank, energy_rank
from lorakit.spectral.weighted import input_weighted, truncate_weighted

if TYPE_CHECKING:
    from torch import nn

Ranks = int | Mapping[str, int]


@dataclass(frozen=True)
class CompressedModule:
    """One module before and after.

    `energy_kept` is ‖ΔŴ‖_F² / ‖ΔW‖_F², and `weighted_energy_kept` the same of ΔW C^½ where inputs were given; 1 where
    ΔW = 0. `error` is ‖written − ΔŴ‖_F / ‖ΔŴ‖_F, from the rounding of what is stored; None where nothing was verified.
    """

    module_name: str
    role: Role | None
    layer: int | None
    rank: int
    kept_rank: int
    parameters: int
    energy_kept: float
    weighted_energy_kept: float | None
    low_rank_part_only: bool
    error: float | None


@dataclass(frozen=True)
class CompressReport(WrittenReport):
    """What `truncate` wrote; the energies are of all modules, Σ ‖·‖_F².

    Parameters are those of the factors, `parameters_beside` those of all else in the file.
    """

    path: str
    source: str
    criterion: str
    r: int
    lora_alpha: float
    parameters_before: int
    parameters: int
    parameters_beside: int
    energy_kept: float
    weighted_energy_kept: float | None
    verified: bool
    modules: tuple[CompressedModule, ...]
    findings: tuple[Finding, ...]


def truncate(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    out: str | os.PathLike[str],
    *,
    ranks: Ranks | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    max_rank: int | None = None,
    activations: Mapping[str, Tensor] | None = None,
    second_moments: Mapping[str, Tensor] | None = None,
    adapter_name: str | None = None,
    verify: bool = True,
) -> CompressReport:
    """Write the best adapter of lower rank, as a plain LoRA that PEFT loads; exactly one criterion is to be given.

    Every module's ΔW is cut by Eckart–Young from its factors; ΔW is never formed. All modules are written with one
    scaling α/r, also where ranks differ (`rank_pattern` and `alpha_pattern` say so, and rsLoRA becomes plain scaling),
    so that servers that ignore the patterns are right too; modules that keep rank and scaling keep their tensors.
    modules_to_save, biases, embeddings, `lora_bias` and the record of surgery are carried over. FISHERLORA and ADALORA
    become LORA. Of DoRA the magnitudes are kept, so the energies are those of the low-rank part, as the report says;
    the best cut of the whole needs the base weight.

    Args:
        adapter: a directory, a file with its config beside it, a Hub id, or a PeftModel, which is not changed.
        out: a directory, made if need be; the adapter's files in it are replaced, and only if all goes well.
        ranks: one rank that every module must have at least; or ranks by module name or pattern, as in PEFT's
            `rank_pattern`, where the other modules keep theirs.
        energy: the share of every module's ‖ΔW‖_F² that is kept, by the smallest rank that does, at least 1.
        budget: of all factors: a number of parameters, or a string such as "2M" (parameters) or "4MB" (bytes in the
            dtype they are stored in); ranks by greedy energy per parameter, at least 1.
        max_rank: a bound for every module's rank.
        activations: inputs (n, d_in) of every module, by its name: what is minimised is then ‖(ΔW − ΔŴ) C^½‖_F with C
            the mean of x xᵀ, of any rank; `energy` and `budget` are of ΔW C^½.
        second_moments: C (d_in, d_in) itself, instead.
        verify: read back what was written, and compare it with what was meant, before it takes its place.
    Raises: TypeError unless one criterion is given; ValueError for one that cannot be met; AdapterFileError for
        adapters that are broken or not finite; UnsupportedModelError for SPECLORA, grouped convolutions,
        `target_parameters` and inits that changed the base; OSError. `out` is then as it was.
    References: Eckart & Young, Psychometrika 1936.
    """
    criterion = _criterion(ranks=ranks, energy=energy, budget=budget, max_rank=max_rank)
    if activations is not None and second_moments is not None:
        raise TypeError("Give `activations` or `second_moments`, not both.")
    view = open_saved_adapter(adapter, adapter_name=adapter_name)
    check_rewritable(view)
    inputs = _Inputs(view, activations, second_moments)
    with torch.no_grad():
        plain, weighted = _spectra(view, inputs)
        kept = _kept_ranks(view.modules, weighted or plain, ranks, energy, budget, max_rank)
        tensors = carried_tensors(view)
        scaling = common_scaling(module.scaling for module in view.modules)
        updates: dict[str, LowRank] = {}
        with _progress("truncating", len(view.modules)) as progress:
            for module in view.modules:
                updates[module.name], written = _cut(view, module, kept[module.name], scaling, inputs)
                tensors |= written
                progress.update()
        pruned = any(finding.code == "pruned" for finding in view.findings)
        final = {name: update.rank for name, update in updates.items()}
        config = plain_config(view.settings.raw, final, scaling, spell_out=pruned)
        edits = _edits(adapter, view, adapter_name)
        errors = write_plain(out, tensors, config, updates, edits=edits, verify=verify)
        return _report(
            view,
            updates,
            plain,
            weighted,
            errors,
            path=os.fspath(out),
            criterion=criterion,
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            verified=verify,
        )


def _criterion(**given: object) -> str:
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise TypeError(f"Exactly one of {', '.join(f'`{n}`' for n in given)} must be given; got {named or 'none'}.")
    return named[0]


class _Inputs:
    """What is known of the modules' inputs: of all of them, or of none."""

    def __init__(
        self, view: Adapter, activations: Mapping[str, Tensor] | None, second_moments: Mapping[str, Tensor] | None
    ) -> None:
        self._name = "activations" if activations is not None else "second_moment"
        self._given = activations if activations is not None else second_moments
        if self._given is None:
            return
        differing = sorted(self._given.keys() ^ {module.name for module in view.modules})
        if differing:
            raise ValueError(f"The inputs of every module must be given, and of no other; {differing[0]!r} differs.")

    def __bool__(self) -> bool:
        return self._given is not None

    def seen(self, module: AdapterModule, update: LowRank) -> LowRank:
        """ΔW C^½, as `lorakit.spectral.weighted.input_weighted` has it."""
        assert self._given is not None
        value = self._given[module.name]
        value = value.to(update.device) if isinstance(value, Tensor) else value
        try:
            return input_weighted(update, **{self._name: value})
        except (ValueError, TypeError) as error:
            raise type(error)(f"{module.name}: {error}") from None


def _spectra(view: Adapter, inputs: _Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Singular values in float64 on the CPU, by module: of ΔW, and of ΔW C^½ where inputs are given."""
    plain: dict[str, Tensor] = {}
    weighted: dict[str, Tensor] = {}
    with _progress("spectra", len(view.modules)) as progress:
        for modules, update in view.batches():
            for i, module in enumerate(modules):
                check_finite(view, module, LowRank(update.B[i], update.A[i]))
            for module, sigma in zip(modules, update.singular_values().double().cpu(), strict=True):
                if not bool(sigma.isfinite().all()):
                    raise AdapterFileError(f"{view.path}: {module.name}: ΔW overflows, though its factors are finite.")
                plain[module.name] = sigma
            progress.update(len(modules))
    if inputs:
        for module in view.modules:
            weighted[module.name] = inputs.seen(module, view.factors(module)).singular_values().cpu()
    return plain, weighted


def _kept_ranks(
    modules: Sequence[AdapterModule],
    spectra: Mapping[str, Tensor],
    ranks: Ranks | None,
    energy: float | None,
    budget: int | str | None,
    max_rank: int | None,
) -> dict[str, int]:
    if ranks is not None:
        return _given_ranks(modules, ranks)
    if max_rank is not None:
        most = _positive("max_rank", max_rank)
        return {module.name: min(module.rank, most) for module in modules}
    if energy is not None:
        if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
            raise ValueError(f"`energy` must be a share in (0, 1]; got {energy!r}.")
        return {module.name: max(1, int(energy_rank(spectra[module.name], energy))) for module in modules}
    assert budget is not None
    amount, unit = read_budget(budget)
    costs = {module.name: _cost(module, unit) for module in modules}
    return allocate({name: sigma.tolist() for name, sigma in spectra.items()}, costs, amount).ranks


def _cost(module: AdapterModule, unit: str) -> int:
    """Of one rank, in parameters or in bytes as stored."""
    if unit == "parameters":
        return module.d_out + module.d_in
    assert module.A.dtype is not None
    assert module.B.dtype is not None
    return module.d_out * module.B.dtype.itemsize + module.d_in * module.A.dtype.itemsize


def _given_ranks(modules: Sequence[AdapterModule], ranks: Ranks) -> dict[str, int]:
    if not isinstance(ranks, Mapping):
        ranks = {re.escape(module.name): _positive("ranks", ranks) for module in modules}
    for key, value in ranks.items():
        _positive(f"ranks[{key!r}]", value)
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"`ranks` has the key {key!r}, which is no regular expression: {error}.") from None
    stray = unmatched_keys(ranks, [module.name for module in modules])
    if stray:
        raise ValueError(f"`ranks` has {stray[0]!r}, which matches no module; the first is {modules[0].name!r}.")
    kept = {module.name: lookup(ranks, module.name, module.rank) for module in modules}
    beyond = [module for module in modules if kept[module.name] > module.rank]
    if beyond:
        name, rank = beyond[0].name, beyond[0].rank
        raise ValueError(
            f"`ranks` must not exceed a module's own rank; {name} has {rank}, and {kept[name]} was asked for. "
            f"`max_rank` only bounds them."
        )
    return kept


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
    return value


def _cut(
    view: Adapter, module: AdapterModule, rank: int, scaling: float, inputs: _Inputs
) -> tuple[LowRank, dict[str, Tensor]]:
    """The module's best update of that rank at that scaling, and the tensors that say so."""
    update = view.factors(module)
    unchanged = rank == module.rank and module.E is None
    if unchanged and module.scaling == scaling:
        cut = update
    else:
        weighted = bool(inputs) and not unchanged
        cut = truncate_weighted(update, inputs.seen(module, update), rank) if weighted else update.truncate(rank)
        if cut.scaling != scaling:
            cut = LowRank(cut.B * (module.scaling / scaling), cut.A, scaling)
    tensors = factor_tensors(module, cut)
    if module.magnitude is not None:
        tensors[tensor_name(module.name, "magnitude")] = _finite(view, module.magnitude)
    if module.bias is not None:  # is scaled as B A is
        bias = _finite(view, module.bias)
        ratio = module.scaling / scaling
        tensors[tensor_name(module.name, "bias")] = bias if ratio == 1 else (bias * ratio).to(bias.dtype)
    return cut, tensors


def _finite(view: Adapter, info: TensorInfo) -> Tensor:
    value = view.tensor(info)
    if not bool(value.isfinite().all()):
        raise AdapterFileError(f"{view.path}: {info.key} has NaN or infinite entries.")
    return value


def _edits(adapter: object, view: Adapter, adapter_name: str | None) -> list[dict[str, Any]]:
    """The record of surgery of what was opened."""
    if isinstance(adapter, str | os.PathLike):
        path = Path(adapter)
        return read_edits(path if path.is_dir() else path.parent)
    configs = getattr(adapter, "peft_config", None)
    if configs is None:
        return []
    return edits_of(configs[adapter_name or getattr(adapter, "active_adapter", "default")])


def _report(
    view: Adapter,
    updates: Mapping[str, LowRank],
    spectra: Mapping[str, Tensor],
    weighted: Mapping[str, Tensor],
    errors: Mapping[str, float],
    **summary: Any,
) -> CompressReport:
    rows = []
    total, seen_total = _Shares(spectra), _Shares(weighted)
    for module in view.modules:
        name, update = module.name, updates[module.name]
        whole = update.rank >= len(spectra[name])
        kept = spectra[name] if whole else spectra[name][: update.rank]
        if weighted and not whole:  # not the leading components
            kept = update.singular_values().double().cpu()
        rows.append(
            CompressedModule(
                module_name=name,
                role=module.role,
                layer=module.layer,
                rank=module.rank,
                kept_rank=update.rank,
                parameters=update.rank * (module.d_out + module.d_in),
                energy_kept=total.add(name, kept),
                weighted_energy_kept=seen_total.add(name, weighted[name][: update.rank]) if weighted else None,
                low_rank_part_only=module.magnitude is not None,
                error=errors.get(name),
            )
        )
    partial = [row for row in rows if row.low_rank_part_only]
    findings = [finding for finding in view.findings if finding.severity != "info"]
    if partial:
        message = (
            f"{len(partial)} modules have DoRA magnitudes, which were kept as they were: the cut, and its energy, are "
            f"of the low-rank part alone."
        )
        findings.append(Finding("info", "low_rank_part_only", None, message))
    return CompressReport(
        source=view.path,
        parameters_before=sum(module.parameters for module in view.modules),
        parameters=sum(row.parameters for row in rows),
        parameters_beside=sum(extra.info.numel for extra in view.extras)
        + sum(info.numel for module in view.modules for info in module.extras),
        energy_kept=total.overall,
        weighted_energy_kept=seen_total.overall if weighted else None,
        modules=tuple(rows),
        findings=tuple(findings),
        **summary,
    )


class _Shares:
    """Shares of energy kept, module by module and over all; 1 where there is none to keep."""

    def __init__(self, spectra: Mapping[str, Tensor]) -> None:
        self._spectra = spectra
        self._peak = max((float(sigma.max()) for sigma in spectra.values() if len(sigma)), default=0.0) or 1.0
        self._kept = self._total = 0.0

    def add(self, name: str, kept: Tensor) -> float:
        of_all = float((self._spectra[name] / self._peak).square().sum())
        of_kept = min(of_all, float((kept / self._peak).square().sum()))
        self._kept, self._total = self._kept + of_kept, self._total + of_all
        return of_kept / of_all if of_all > 0 else 1.0

    @property
    def overall(self) -> float:
        return self._kept / self._total if self._total > 0 else 1.0


def _progress(what: str, modules: int) -> Any:
    return tqdm(total=modules, desc=what, delay=1.0, unit="module", leave=False, disable=None)
