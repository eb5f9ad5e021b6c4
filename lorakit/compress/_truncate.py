"""The best adapter of lower rank, written as a plain LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import preview
from lorakit.adapters import Adapter, AdapterModule, open_saved_adapter
from lorakit.adapters.companions import check_overwrite, companions_of, local_directory
from lorakit.adapters.edit_log import read_edits
from lorakit.adapters.keys import tensor_name
from lorakit.adapters.lora_config import minimal_config, spelled_out
from lorakit.adapters.rewritable import carried_tensors, check_finite, check_rewritable, contents_of, finite_tensor
from lorakit.adapters.whole import with_whole_updates
from lorakit.adapters.write_lora import StoredUpdate, plain_lora, stored_update, write_lora
from lorakit.compress._ranks import EnergyOf, RankChoice, Ranks, Spectra, little_saved
from lorakit.compress._report import CompressedModule, CompressReport
from lorakit.errors import AdapterFileError, Finding, UnsupportedModelError
from lorakit.serving._needs import needs_of
from lorakit.serving._written import Before, compact_finding, summary
from lorakit.spectral import LowRank
from lorakit.spectral.weighted import input_weighted, truncate_weighted

if TYPE_CHECKING:
    from torch import nn


def truncate(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    out: str | os.PathLike[str],
    *,
    ranks: Ranks | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    max_rank: int | None = None,
    energy_of: EnergyOf = "module",
    per_module: bool = False,
    pad: bool = True,
    for_server: str | Iterable[str] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    second_moments: Mapping[str, Tensor] | None = None,
    base: str | os.PathLike[str] | nn.Module | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> CompressReport:
    """Write the best adapter of lower rank, as a plain LoRA; give exactly one of the first four options.

    Every module's ΔW is cut by Eckart–Young from its factors; ΔW is never formed. All modules are written at one rank
    and one scaling (shorter factors are padded with zeros, rsLoRA becomes plain scaling), which means the same ΔW to
    every server; modules that keep their rank and scaling keep their tensors bit for bit. `energy`, `budget` and
    `max_rank` choose one rank for all modules, because padding makes a file of mixed ranks as large.

    Experts stacked in one parameter are one module: every expert is cut by itself, and all keep one rank, the largest
    that one of them needs.

    modules_to_save, biases, embeddings, `lora_bias` and the record of surgery are carried over, and so are tokenizer,
    chat template and model card where they lie beside the adapter. FISHERLORA and ADALORA become LORA. Without `base`,
    DoRA keeps its magnitudes, and the energies are those of the low-rank part, as the report says.

    Args:
        adapter: a directory, a file with its config beside it, a Hub id, or a PeftModel, which is not changed.
        out: a directory, made if need be; the adapter's files in it are replaced, and only if all goes well.
        ranks: one rank that every module must have at least; or ranks by module name or pattern, as in PEFT's
            `rank_pattern`, where the other modules keep theirs.
        energy: the share of every module's ‖ΔW‖_F² to keep: one rank, the smallest that keeps it in every module.
        budget: of all factors as written, with their padding: a number of parameters, or a string such as "2M"
            (parameters) or "4MB" (bytes in the dtypes they are stored in).
        max_rank: a bound on every module's rank.
        energy_of: "total" keeps `energy` of the sum of the modules' ‖ΔW‖_F² instead.
        per_module: choose ranks module by module (`energy`: the smallest; `budget`: by greedy energy per parameter),
            and write them as they are: a smaller file, for PEFT ≥ 0.15 and vLLM ≥ 0.33 only.
        pad: False writes each module at its own rank, for the same readers.
        for_server: servers that the file is for, such as "lorax" or "tgi,ollama": the rank is raised to one that they
            serve, and `lora_alpha` is an integer where they need it.
        activations: inputs (n, d_in) of every module, by its name: what is minimised is then ‖(ΔW − ΔŴ) C^½‖_F with C
            the mean of x xᵀ, of any rank; `energy` and `budget` are of ΔW C^½.
        second_moments: C (d_in, d_in) itself, instead.
        base: the base model's weights (a directory or file of safetensors, or the model): DoRA and SPECLORA are then
            cut by their whole update, which is written as a plain LoRA. A DoRA's has full rank; its spectrum takes an
            SVD of the weight's size.
        overwrite: allow `out` to be the adapter's own directory, or to hold an adapter that lorakit did not write.
        verify: read back what was written, and compare it with what was meant, before it takes its place.
    Raises: TypeError unless one criterion is given; ValueError for one that cannot be met; AdapterFileError for
        adapters that are broken or not finite; UnsupportedModelError for SPECLORA without `base`, grouped
        convolutions, inits that changed the base, inputs of stacked experts, and what a server refuses; OverwriteError
        (a FileExistsError); OSError. `out` is then as it was.
    References: Eckart & Young, Psychometrika 1936.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))
        >>> report = truncate(model, tempfile.mkdtemp(), max_rank=2)
        >>> report.r, {row.kept_rank for row in report.modules}
        (2, {2})
    """
    if activations is not None and second_moments is not None:
        raise TypeError("Give `activations` or `second_moments`, not both.")
    choice = RankChoice(
        ranks=ranks,
        energy=energy,
        budget=budget,
        max_rank=max_rank,
        energy_of=energy_of,
        per_module=per_module,
        pad=pad,
        needs=needs_of(for_server, pad=pad and not per_module),
    )
    check_overwrite(out, [adapter], overwrite=overwrite)
    view = with_whole_updates(open_saved_adapter(adapter, adapter_name=adapter_name), base)
    source = Source(adapter, view, recorded_edits(adapter))
    return rewrite(source, out, choice, _Inputs(view, activations, second_moments), verify=verify)


@dataclass(frozen=True, eq=False)
class Source:
    """An adapter to rewrite: as it was given, its view, and its record of surgery."""

    given: object
    view: Adapter
    edits: list[dict[str, Any]]


@torch.no_grad()
def rewrite(
    source: Source,
    out: str | os.PathLike[str],
    choice: RankChoice,
    inputs: _Inputs | None = None,
    *,
    verify: bool = True,
    command: str = "compress",
) -> CompressReport:
    """`truncate`, with its options checked; `command` is what the model card says did it."""
    view = source.view
    check_rewritable(view)
    choice.needs.check(contents_of(view))
    plain, weighted = _spectra(view, inputs)
    kept = choice.kept_ranks(view.modules, weighted or plain)
    beside = _beside(view)
    updates: dict[str, LowRank] = {}
    with _progress("truncating", len(view.modules)) as progress:
        for module in view.modules:
            updates[module.name] = _cut(view, module, kept[module.name], inputs)
            progress.update()
    lora = plain_lora(
        [_stored(view, module, updates[module.name]) for module in view.modules],
        pad=choice.padded,
        fitting_rank=choice.needs.rank_at_least,
        integer_alpha=choice.needs.integer_alpha,
    )
    choice.needs.check_rank(lora.r)
    config, findings = minimal_config(view.settings.raw, **lora.fields, **_targets(view, updates))
    companions = companions_of([source.given])
    rows = _Rows(view, updates, plain, weighted)
    fields = summary(os.fspath(out), config, lora, Before.of([view]), beside)
    change = (
        f"`{command}` ({choice.describe()}): rank {fields['rank_before']} → {lora.r}, "
        f"{rows.energy_kept:.4%} of the energy kept."
    )
    errors = write_lora(
        out,
        lora.tensors | beside,
        config,
        companions=companions,
        change=change,
        intended=updates if verify else None,
        edits=source.edits,
    )
    findings += [f for f in view.findings if f.severity != "info" or f.code == "whole_update"]
    findings += [*companions.findings, *_about_dora(view), *compact_finding(lora)]
    if command == "compress":
        findings += little_saved(
            choice, view.modules, weighted or plain, fields["parameters_before"], fields["parameters"]
        )
    return CompressReport(
        **fields,
        source=view.path,
        criterion=choice.criterion,
        energy_kept=rows.energy_kept,
        weighted_energy_kept=rows.weighted_energy_kept,
        verified=verify,
        modules=rows.of(lora.r if choice.padded else None, errors),
        findings=tuple(findings),
    )


def _targets(view: Adapter, updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """Fields that name the modules one by one, where the config names more: those that AdaLoRA pruned to rank 0."""
    if not any(finding.code == "pruned" for finding in view.findings):
        return {}
    return spelled_out(updates)


def recorded_edits(adapter: object) -> list[dict[str, Any]]:
    """The record of surgery beside an adapter on disk; none for a model, which does not know its edits."""
    directory = local_directory(adapter)
    return [] if directory is None else read_edits(directory)


def _cut(view: Adapter, module: AdapterModule, rank: int, inputs: _Inputs | None) -> LowRank:
    """The module's best update of that rank; its own factors where nothing is cut."""
    update = view.factors(module)
    if rank == module.rank and module.E is None:
        return update
    if inputs and rank < module.rank:
        return truncate_weighted(update, inputs.seen(module, update), rank)
    return update.truncate(rank)


def _beside(view: Adapter) -> dict[str, Tensor]:
    """The tensors that are written as they are: beside the updates, and DoRA's magnitudes."""
    magnitudes = {
        tensor_name(module.path, "magnitude"): finite_tensor(view, module.magnitude)
        for module in view.modules
        if module.magnitude is not None
    }
    return carried_tensors(view) | magnitudes


def _stored(view: Adapter, module: AdapterModule, update: LowRank) -> StoredUpdate:
    bias = None if module.bias is None else finite_tensor(view, module.bias)
    if bias is not None and module.whole_of is not None:  # a whole update has the scaling 1
        bias = bias * module.whole_of.scaling
    return stored_update(module, update, bias=bias)


def _about_dora(view: Adapter) -> list[Finding]:
    count = sum(module.magnitude is not None for module in view.modules)
    message = (
        f"{count} modules have DoRA magnitudes, which were kept as they were: the cut, and its energy, are of the "
        f"low-rank part alone. Give the base weights (`base`, --base) to cut the whole update."
    )
    return [Finding("info", "low_rank_part_only", None, message)] if count else []


class _Rows:
    """The report's rows, and the energies of all modules together."""

    def __init__(self, view: Adapter, updates: Mapping[str, LowRank], spectra: Spectra, weighted: Spectra) -> None:
        self._view, self._updates = view, updates
        total, seen_total = _Shares(spectra), _Shares(weighted)
        self._energies: dict[str, tuple[float, float | None]] = {}
        for module in view.modules:
            name, rank = module.name, updates[module.name].rank
            whole = rank >= spectra[name].shape[-1]
            kept = spectra[name][..., :rank]
            if weighted and not whole:  # not the leading components
                kept = updates[name].singular_values().double().cpu()
            seen = seen_total.add(name, weighted[name][:rank]) if weighted else None
            self._energies[name] = total.add(name, kept), seen
        self.energy_kept = total.overall
        self.weighted_energy_kept = seen_total.overall if weighted else None

    def of(self, padded_to: int | None, errors: Mapping[str, float]) -> tuple[CompressedModule, ...]:
        rows = []
        for module in self._view.modules:
            rank = self._updates[module.name].rank
            energy, weighted_energy = self._energies[module.name]
            rows.append(
                CompressedModule(
                    module_name=module.name,
                    role=module.role,
                    layer=module.layer,
                    rank=module.stored.rank,
                    kept_rank=rank,
                    whole_update=module.whole_of is not None,
                    experts=module.experts,
                    parameters=(padded_to or rank) * (module.experts or 1) * (module.d_out + module.d_in),
                    energy_kept=energy,
                    weighted_energy_kept=weighted_energy,
                    low_rank_part_only=module.magnitude is not None,
                    error=errors.get(module.name),
                )
            )
        return tuple(rows)


class _Inputs:
    """The inputs of all modules, or of none; it is false where there are none."""

    def __init__(
        self, view: Adapter, activations: Mapping[str, Tensor] | None, second_moments: Mapping[str, Tensor] | None
    ) -> None:
        self._name = "activations" if activations is not None else "second_moment"
        self._given = activations if activations is not None else second_moments
        if self._given is None:
            return
        stacks = [module.name for module in view.modules if module.experts is not None]
        if stacks:
            option = "activations" if activations is not None else "second_moments"
            raise UnsupportedModelError(
                f"`{option}` must be those of one matrix each, but these modules are stacks of experts, which see "
                f"different tokens: {preview(stacks)}. Leave `{option}` out."
            )
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


def _spectra(view: Adapter, inputs: _Inputs | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
