"""Any of lorakit's adapters as a plain LoRA, which PEFT loads without lorakit and servers serve."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, overload

from peft import PeftModel, PeftType

from lorakit._checks import check_integer, check_number
from lorakit.adapters import open_adapter
from lorakit.adapters.companions import check_overwrite, companions_of
from lorakit.adapters.in_model import live_modules, resolve_adapter_name
from lorakit.adapters.lora_config import minimal_config
from lorakit.adapters.write_lora import Piece, plain_lora, write_lora
from lorakit.compress._ranks import RankChoice, least_rank
from lorakit.compress._truncate import Source, recorded_edits, rewrite
from lorakit.compress.ladder import SmallestReport
from lorakit.errors import ExportError
from lorakit.evaluation import LoadOptions
from lorakit.evaluation.comparison import Question
from lorakit.export._live import (
    LiveUpdate,
    about_masks,
    before_export,
    check,
    check_variants,
    contents_of,
    cut_updates,
    own_rank,
    saved_tensors,
    whole_updates,
)
from lorakit.export._report import ExportedModule, ExportReport
from lorakit.export._smallest import smallest_export
from lorakit.serving._needs import SERVED_RANKS, Needs, needs_of
from lorakit.serving._written import WrittenReport, compact_finding, summary


@overload
def to_lora(
    adapter: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | Literal["auto"] | None = None,
    energy: float = 0.99,
    pad: bool = True,
    for_server: str | Iterable[str] | None = None,
    adapter_name: str | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ExportReport: ...


@overload
def to_lora(
    adapter: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: Literal["smallest"],
    tasks: Any,
    margin: float,
    base: Any = None,
    alpha: float = 0.05,
    guards: Any = (),
    groups: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    used_documents: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    progress: bool = True,
    for_server: str | Iterable[str] | None = None,
    adapter_name: str | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> SmallestReport: ...


def to_lora(
    adapter: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | Literal["auto", "smallest"] | None = None,
    energy: float = 0.99,
    pad: bool = True,
    for_server: str | Iterable[str] | None = None,
    adapter_name: str | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    tasks: Any = None,
    margin: float | None = None,
    base: Any = None,
    **question: Any,
) -> ExportReport | SmallestReport:
    """Write an adapter, of a PeftModel or at rest, as a plain LORA checkpoint; a model is not changed.

    FISHERLORA and LORA keep their tensors. SPECLORA's mask is itself an update of rank ≤ k, so the whole is written
    exactly at its own rank, at most r + k, a module. With `rank` every module is cut to at most that, optimally
    (Eckart–Young), and the report has the share of the energy that was left out.

    All modules are written at one rank and one scaling (shorter factors are padded with zeros, rsLoRA becomes plain
    scaling), which means the same ΔW to every server.

    Args:
        adapter: a PeftModel, `adapter_name` saying which of its adapters, if not the active one; or a directory, a file
            or a Hub id, unless it is a SPECLORA, whose mask is an update of the base weight.
        out: a directory, made if need be; the adapter's files in it are replaced, and only if all goes well.
        rank: "auto" writes the smallest rank that servers serve (8, 16, 32, 64, 128, 256, 320, 512) and that keeps
            `energy`, the share of ‖ΔW‖_F² in every module. "smallest" writes the smallest rank of the ladder 512, 256,
            128, …, 2, 1 below the exact one at which every task survives, with its certificate, as
            `lorakit.compress.smallest` does, and nothing where none does; the adapter itself is the reference.
        pad: False writes each module at its own rank: a smaller file, for PEFT ≥ 0.15 and vLLM ≥ 0.33 only.
        for_server: servers that the file is for, as in `lorakit.compress.truncate`.
        source: where the adapter of a model was loaded from: tokenizer, chat template, model card and record of
            surgery beside it are carried over, as they are for an adapter at rest.
        overwrite: allow `out` to be the adapter's own directory, or to hold an adapter that lorakit did not write.
        tasks, margin, question: with "smallest", as in `lorakit.evaluation.certify`; `question` are alpha, guards,
            groups, tokenizer, limit, used_documents, cache, options and progress.
        base: with "smallest", the base model: a path, a Hub id or a model; None: that of the PeftModel.
    Returns: an `ExportReport`; with "smallest" a `lorakit.compress.SmallestReport`.
    Raises: ExportError (a ValueError) for what no plain LoRA can say; ValueError for a bad `rank`; OverwriteError (a
        FileExistsError); for adapters at rest also what `lorakit.compress.truncate` raises.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from lorakit import SpecLoRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> model = get_peft_model(base, SpecLoRAConfig(r=2, k=4, target_modules=["0"]))
        >>> to_lora(model, tempfile.mkdtemp()).r
        6
    """
    if rank == "smallest":
        if tasks is None or margin is None or not pad:
            raise TypeError("`rank='smallest'` needs `tasks` and `margin`, and writes all modules at one rank.")
        check_overwrite(out, [adapter, source], overwrite=overwrite)
        beside = source if isinstance(adapter, PeftModel) else adapter

        def write(model: PeftModel | str | os.PathLike[str], directory: str, rank: int) -> ExportReport:
            live: dict[str, Any] = (
                {"adapter_name": adapter_name, "source": beside} if isinstance(model, PeftModel) else {}
            )
            return to_lora(model, directory, rank=rank, for_server=for_server, **live)

        asked = Question(tasks=tasks, margin=margin, **question)
        needs = needs_of(for_server, pad=True)
        return smallest_export(adapter, out, write, asked, base=base, needs=needs, adapter_name=adapter_name)
    given = [name for name, value in {"tasks": tasks, "margin": margin, "base": base, **question}.items() if value]
    if given:
        raise TypeError(f"`{given[0]}` is for `rank='smallest'`; got rank={rank!r}.")
    if rank is not None and rank != "auto":
        try:
            check_integer("rank", rank)
        except ValueError:
            raise ValueError(f"`rank` must be a positive integer, 'auto' or None; got {rank!r}.") from None
    check_number("energy", energy, above=0, most=1)
    needs = needs_of(for_server, pad=pad)
    if rank == "auto":
        needs = Needs(needs.servers, among=SERVED_RANKS)
    wanted = _Wanted(rank, energy, pad, needs)
    check_overwrite(out, [adapter, source], overwrite=overwrite)
    if isinstance(adapter, str | os.PathLike):
        return _at_rest(adapter, out, wanted, adapter_name)
    return _from_model(adapter, out, wanted, resolve_adapter_name(adapter, adapter_name), source)


@dataclass(frozen=True)
class _Wanted:
    """The rank to write, and how; see `to_lora`."""

    rank: int | Literal["auto"] | None
    energy: float
    pad: bool
    needs: Needs

    def describe(self) -> str:
        return f"rank={self.rank!r}" + (f", energy={self.energy:g}" if self.rank == "auto" else "")


def _at_rest(
    adapter: str | os.PathLike[str], out: str | os.PathLike[str], wanted: _Wanted, adapter_name: str | None
) -> ExportReport:
    view = open_adapter(adapter, adapter_name=adapter_name)
    if view.settings.peft_type == "SPECLORA":
        raise ExportError(
            f"{view.path} is a SPECLORA adapter, whose mask is an update of the base weight: load it into its model, "
            f"and export that (`lorakit export --base MODEL`)."
        )
    if wanted.rank is not None and any(module.magnitude is not None for module in view.modules):
        raise ExportError(f"{view.path} has DoRA magnitudes, which `rank` cannot truncate; leave `rank` out.")
    largest = max((module.rank for module in view.modules), default=1)
    criterion: dict[str, Any] = {"max_rank": largest if wanted.rank is None else wanted.rank}
    if wanted.rank == "auto":
        criterion = {"energy": wanted.energy}
    choice = RankChoice(**criterion, pad=wanted.pad, needs=wanted.needs)
    report = rewrite(Source(adapter, view, recorded_edits(adapter)), out, choice, command="export")
    shared = {f.name: getattr(report, f.name) for f in fields(WrittenReport) if f.name != "modules"}
    return ExportReport(
        **shared,
        source=report.source,
        discarded_energy=1 - report.energy_kept,
        modules=tuple(
            ExportedModule(row.module_name, row.kept_rank, row.rank, row.parameters, 1 - row.energy_kept)
            for row in report.modules
        ),
    )


def _from_model(
    model: PeftModel,
    out: str | os.PathLike[str],
    wanted: _Wanted,
    adapter_name: str,
    source: str | os.PathLike[str] | None,
) -> ExportReport:
    config = model.peft_config[adapter_name]
    modules = live_modules(model, adapter_name)
    check(config, modules, wanted.rank)
    tensors = saved_tensors(model, adapter_name, modules)
    wanted.needs.check(contents_of(config, tensors))
    updates = whole_updates(modules, tensors, cut=wanted.rank is not None)
    if wanted.rank is not None:
        updates = cut_updates(updates, _rank_to_keep(updates, wanted))
    lora = plain_lora(
        [update.stored for update in updates],
        pad=wanted.pad,
        fitting_rank=wanted.needs.rank_at_least,
        integer_alpha=wanted.needs.integer_alpha,
    )
    wanted.needs.check_rank(lora.r)
    beside = {key: tensor for key, tensor in tensors.items() if key not in lora.tensors and ".lora_spec." not in key}
    check_variants(updates, lora, beside)
    base_model = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None)
    plain, findings = minimal_config(config.to_dict(), **lora.fields, base_model_name_or_path=base_model or None)
    discarded, energy = sum(update.discarded for update in updates), sum(update.energy for update in updates)
    share = discarded / energy if energy > 0 else 0.0
    peft_type = PeftType(config.peft_type).value
    layout = lora.tensors | beside
    write_lora(
        out,
        layout,
        plain,
        (piece for piece in [Piece(layout)]),
        companions=companions_of([source]),
        change=lambda: (
            f"`export` ({wanted.describe()}): {peft_type} → LORA at rank {lora.r}, {share:.4%} of the energy left out."
        ),
        edits=recorded_edits(source),
    )
    return ExportReport(
        **summary(os.fspath(out), plain, lora, before_export(modules, tensors), beside),
        source=f"{type(model.get_base_model()).__name__}, adapter {adapter_name!r}",
        discarded_energy=share,
        modules=_rows(updates, lora.r if wanted.pad else None),
        findings=(*findings, *compact_finding(lora), *about_masks(modules, updates, lora)),
    )


def _rank_to_keep(updates: Sequence[LiveUpdate], wanted: _Wanted) -> int:
    if isinstance(wanted.rank, int):
        return wanted.rank
    spectra = [update.singular_values for update in updates if update.singular_values is not None]
    return wanted.needs.rank_at_least(max(least_rank(sigma, wanted.energy) for sigma in spectra))


def _rows(updates: Sequence[LiveUpdate], padded_to: int | None) -> tuple[ExportedModule, ...]:
    return tuple(
        ExportedModule(
            module_name=update.stored.name,
            rank=update.stored.rank,
            source_rank=own_rank(update.module),
            parameters=update.stored.parameters_of_a_rank * (padded_to or update.stored.rank),
            discarded_energy=update.discarded / update.energy if update.energy > 0 else 0.0,
        )
        for update in updates
    )
