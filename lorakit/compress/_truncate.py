"""The best adapter of lower rank, written as a plain LoRA."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import preview
from lorakit.adapters import Adapter, AdapterModule, TensorInfo, open_saved_adapter
from lorakit.adapters.companions import check_overwrite, companions_of, local_directory
from lorakit.adapters.edit_log import read_edits
from lorakit.adapters.keys import tensor_name
from lorakit.adapters.lora_config import minimal_config, spelled_out
from lorakit.adapters.rewritable import (
    carried_infos,
    check_finite,
    check_rewritable,
    contents_of,
    finite_tensor,
    planned_tensor,
)
from lorakit.adapters.whole import with_whole_updates
from lorakit.adapters.write_lora import (
    Piece,
    PlainLora,
    StoredUpdate,
    plain_lora,
    planned_update,
    stored_update,
    write_lora,
)
from lorakit.compress._ranks import EnergyOf, RankChoice, Ranks, little_saved
from lorakit.compress._report import CompressReport
from lorakit.compress._rows import Rows
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
    cut = _Cut(view, choice.kept_ranks(view.modules, weighted or plain), inputs)
    beside = _beside(view)
    lora = _plan(cut, choice)
    config, findings = minimal_config(view.settings.raw, **lora.fields, **_targets(view))
    companions = companions_of([source.given])
    rows = Rows(plain, weighted)
    planned = {key: planned_tensor(view, info) for key, info in beside.items()}
    fields = summary(os.fspath(out), config, lora, Before.of([view]), planned)

    def pieces() -> Generator[Piece]:
        for module, update in cut.updates("truncating"):
            rows.add(module, update)
            yield Piece(lora.written(_stored(view, module, update)), module.name, update)
        for key, info in beside.items():
            yield Piece({key: finite_tensor(view, info)})

    errors = write_lora(
        out,
        lora.tensors | planned,
        config,
        pieces(),
        companions=companions,
        change=lambda: (
            f"`{command}` ({choice.describe()}): rank {fields['rank_before']} → {lora.r}, "
            f"{rows.energy_kept:.4%} of the energy kept."
        ),
        verify=verify,
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
        modules=rows.of(view, lora.r if choice.padded else None, errors),
        findings=tuple(findings),
    )


def _plan(cut: _Cut, choice: RankChoice) -> PlainLora:
    """What will be written, before it is computed."""
    view, needs = cut.view, choice.needs
    lora = plain_lora(
        [cut.planned(module) for module in view.modules],
        pad=choice.padded,
        fitting_rank=needs.rank_at_least,
        integer_alpha=needs.integer_alpha,
        computed=lambda: (_stored(view, module, update) for module, update in cut.updates("choosing the scaling")),
    )
    needs.check_rank(lora.r)
    return lora


def _targets(view: Adapter) -> dict[str, Any]:
    """Fields that name the modules one by one, where the config names more: those that AdaLoRA pruned to rank 0."""
    if not any(finding.code == "pruned" for finding in view.findings):
        return {}
    return spelled_out(module.name for module in view.modules)


def recorded_edits(adapter: object) -> list[dict[str, Any]]:
    """The record of surgery beside an adapter on disk; none for a model, which does not know its edits."""
    directory = local_directory(adapter)
    return [] if directory is None else read_edits(directory)


@dataclass(frozen=True, eq=False)
class _Cut:
    """The modules' best updates of the ranks that are kept, computed when they are asked for."""

    view: Adapter
    kept: Mapping[str, int]
    inputs: _Inputs | None

    def planned(self, module: AdapterModule) -> StoredUpdate:
        """A module's update before it is computed, on the device "meta"."""
        rank = module.rank
        if self._changes(module):
            rank = min(self.kept[module.name], rank, module.d_out, module.d_in)
        bias = None if module.bias is None else planned_tensor(self.view, module.bias)
        return planned_update(module, rank, module.scaling, bias=bias)

    def updates(self, description: str) -> Iterator[tuple[AdapterModule, LowRank]]:
        """Every module with its update, in an order that suits reading; a batch of modules is in memory at a time."""
        with _progress(description, len(self.view.modules)) as progress:
            for modules, updates in self.view.batches():
                for module, B, A in zip(modules, updates.B, updates.A, strict=True):
                    yield module, self._of(module, LowRank(B, A, module.scaling))
                    progress.update()

    def _changes(self, module: AdapterModule) -> bool:
        return self.kept[module.name] != module.rank or module.E is not None

    def _of(self, module: AdapterModule, update: LowRank) -> LowRank:
        """The best update of the rank that is kept; the module's own factors where nothing is cut."""
        rank = self.kept[module.name]
        if not self._changes(module):
            return update
        if self.inputs and rank < module.rank:
            return truncate_weighted(update, self.inputs.seen(module, update), rank)
        return update.truncate(rank)


def _beside(view: Adapter) -> dict[str, TensorInfo]:
    """The tensors that are written as they are, by key: beside the updates, and DoRA's magnitudes."""
    magnitudes = {
        tensor_name(module.path, "magnitude"): module.magnitude
        for module in view.modules
        if module.magnitude is not None
    }
    return carried_infos(view) | magnitudes


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
                if inputs:
                    own = LowRank(update.B[i], update.A[i], module.scaling)
                    weighted[module.name] = inputs.seen(module, own).singular_values().cpu()
            for module, sigma in zip(modules, update.singular_values().double().cpu(), strict=True):
                if not bool(sigma.isfinite().all()):
                    raise AdapterFileError(f"{view.path}: {module.name}: ΔW overflows, though its factors are finite.")
                plain[module.name] = sigma
            progress.update(len(modules))
    return plain, weighted


def _progress(what: str, modules: int) -> Any:
    return tqdm(total=modules, desc=what, delay=1.0, unit="module", leave=False, disable=None)
