"""Several adapters as one plain LoRA.

`linear` and `svd` stay in factor space: Σ wᵢ ΔWᵢ has the factors [w₁s₁B₁ … wₙsₙBₙ] and [A₁; …; Aₙ]. `ties` and `dare`
are defined entry by entry of ΔW, so each module's ΔWs are formed, one module at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._checks import check_integer, check_number
from lorakit.adapters import Adapter, AdapterModule, open_saved_adapter
from lorakit.adapters.companions import check_overwrite, companions_of, label_of
from lorakit.adapters.lora_config import minimal_config
from lorakit.adapters.rewritable import check_rewritable, contents_of, finite_tensor, planned_tensor
from lorakit.adapters.whole import with_whole_updates
from lorakit.adapters.write_lora import Piece, PlainLora, plain_lora, planned_update, stored_update, write_lora
from lorakit.merging._combine import DENSE, METHODS, Merged, Method
from lorakit.merging._report import MergedModule, MergeReport
from lorakit.merging._together import Beside, Present, config_of, findings_about, layouts_of, modules_of, tensors_beside
from lorakit.merging._updates import Merging, Recipe, checked_weights
from lorakit.serving._needs import Needs, needs_of
from lorakit.serving._written import Before, compact_finding, summary

if TYPE_CHECKING:
    from torch import nn

    from lorakit.evaluation import LoadOptions


def merge(
    adapters: Sequence[str | os.PathLike[str] | nn.Module | Adapter],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    pad: bool = True,
    for_server: str | Iterable[str] | None = None,
    base: str | os.PathLike[str] | nn.Module | None = None,
    tasks: Mapping[Any, Any] | None = None,
    alpha: float = 0.05,
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> MergeReport:
    """Merge adapters of one base model, and write the merge as a plain LoRA that PEFT and servers load.

    * ``linear``: Σ wᵢ ΔWᵢ, exact with the sum of the ranks, or cut to `rank` or `energy`. (PEFT's "cat"; its "linear"
      interpolates factors, which is not the sum of the updates.)
    * ``svd``: the same sum, cut to `rank`, by default the largest of the adapters' ranks.
    * ``ties``: of each module's ΔWᵢ the `density` largest entries are kept; per entry the sign with the larger total
      wins, and the wᵢ-weighted values that have it are averaged. Then the best cut to `rank`, by default as in ``svd``.
    * ``dare``: entries are kept at random with probability `density` and divided by it, then summed with weights; then
      cut as in ``ties``.

    ``linear`` and ``svd`` never form ΔW. ``ties`` and ``dare`` do, one module at a time, with PEFT's own functions, and
    need an eigendecomposition of min(d_out, d_in)² entries a module (two with `energy`): minutes to hours on large
    models. All modules are written at one rank, shorter factors padded with zeros, so every server applies the same ΔW.
    Adapters may have different ranks, scalings, and partly different modules: a module that one lacks is 0 there.
    Tensors beside the updates (modules_to_save and the like) are carried over from those that have them, if they agree;
    tokenizer, chat template and model card come from the first adapter that has them.

    With `tasks`, what the merge keeps of each adapter's tasks is measured before `out` is touched: on the same
    documents the scores of the base model, of the adapter by itself, of the merge, and of a random adapter with the
    merge's norm in every module, with paired intervals. The report has them as `retention`, and the merge is written
    whatever they are.

    Args:
        weights: one for each adapter, not normalised; None is 1/n each.
        rank, energy: one at most; `energy` chooses the smallest rank that keeps that share of ‖ΔW‖_F² in every module.
        density: for ``ties`` and ``dare``, in (0, 1].
        seed: of ``dare``'s choice, and of the random adapter.
        pad: False writes each module at its own rank, and chooses it module by module: for PEFT ≥ 0.15 and
            vLLM ≥ 0.33 only.
        for_server: servers that the file is for, as in `lorakit.compress.truncate`.
        base: the base model's weights (a directory or file of safetensors, or the model): DoRA and SPECLORA are then
            merged by their whole updates. With `tasks` the model that is scored, which may also be a Hub id.
        tasks: from each adapter, as it is in `adapters`, to its task or tasks: as in `lorakit.evaluation.certify`.
        alpha: the level of each one-sided bound.
        limit, cache, options, tokenizer, progress: of the scoring; as in `lorakit.evaluation.certify`.
        overwrite: allow `out` to be one of the adapters, or to hold an adapter that lorakit did not write.
        verify: read back what was written, and compare it with what was meant, before it takes its place.
    Raises: ValueError for weights, ranks and densities that make no sense, shapes that differ and tensors beside the
        updates that disagree; TypeError for options that the method has no use for, and `tasks` without `base`;
        UnsupportedModelError for `lora_bias`, for DoRA and SPECLORA without `base`, and what else a sum of updates is
        not one adapter of; EvaluationError for tasks that cannot be scored; AdapterFileError; OverwriteError (a
        FileExistsError); OSError. `out` is then as it was.
    References: Yadav et al., "TIES-Merging", NeurIPS 2023; Yu et al., "Language Models are Super Mario" (DARE),
        ICML 2024.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> merge([model, model], tempfile.mkdtemp(), weights=[0.6, 0.4]).r
        4
    """
    chosen = checked_weights(adapters, weights)
    _check_options(method, rank, energy, density)
    check_overwrite(out, adapters, overwrite=overwrite)
    needs = needs_of(for_server, pad=pad)
    recipe = Recipe(method, rank, energy, density, seed, pad, needs)
    if tasks is None:
        return _merge(adapters, out, chosen, recipe, base, verify)
    from lorakit.merging._retention import Retaining, place, places_of

    retaining = Retaining(
        places_of(tasks, adapters), adapters, base, alpha, limit, cache, options, tokenizer, seed, progress
    )
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory, "merged")
        report = _merge(adapters, written, chosen, recipe, _weights_of(base, adapters), verify)
        retention = retaining.measure(written, Path(directory, "random"))
        place(written, out)
    return replace(report, path=os.fspath(out), retention=retention)


def _weights_of(base: Any, adapters: Sequence[Any]) -> Any:
    """`base`, where an update needs its weights; it may otherwise be a Hub id, which is for scoring alone."""
    views = [open_saved_adapter(adapter) for adapter in adapters]
    parts = [module for view in views for module in view.modules]
    return base if any(module.magnitude is not None or module.mask is not None for module in parts) else None


def _merge(
    adapters: Sequence[str | os.PathLike[str] | nn.Module | Adapter],
    out: str | os.PathLike[str],
    chosen: Sequence[float],
    recipe: Recipe,
    base: str | os.PathLike[str] | nn.Module | None,
    verify: bool,
) -> MergeReport:
    """Write the merge."""
    needs, method, pad = recipe.needs, recipe.method, recipe.pad
    views = _opened(adapters, base, needs)
    present = modules_of(views)
    beside, findings = tensors_beside(views)
    findings += findings_about(views, present)
    layouts = layouts_of(present)
    merging = Merging(views, present, chosen, recipe)
    lora = _plan(layouts, merging.ranks, recipe)
    config, about_config = minimal_config(config_of(views, present), **lora.fields)
    companions = companions_of(adapters)
    terms = " + ".join(f"{weight:.6g} · {label_of(view.path)}" for weight, view in zip(chosen, views, strict=True))
    planned = {key: planned_tensor(view, info) for key, (view, info) in beside.items()}
    merges: dict[str, Merged] = {}
    errors = write_lora(
        out,
        lora.tensors | planned,
        config,
        _pieces(merging, layouts, lora, beside, merges),
        companions=companions,
        change=lambda: (
            f"`merge` ({method}): {terms}, at rank {lora.r}, {_energy_kept(merges):.4%} of the merge's energy kept."
        ),
        verify=verify,
    )
    return MergeReport(
        **summary(os.fspath(out), config, lora, Before.of(views), planned),
        sources=tuple(view.path for view in views),
        weights=tuple(chosen),
        method=method,
        density=recipe.density,
        seed=recipe.seed if method == "dare" else None,
        energy_kept=_energy_kept(merges),
        verified=verify,
        modules=_rows(present, layouts, merges, lora.r if pad else None, errors),
        findings=(*findings, *about_config, *companions.findings, *compact_finding(lora)),
    )


def _opened(
    adapters: Iterable[str | os.PathLike[str] | nn.Module | Adapter],
    base: str | os.PathLike[str] | nn.Module | None,
    needs: Needs,
) -> list[Adapter]:
    views = [with_whole_updates(open_saved_adapter(adapter), base) for adapter in adapters]
    for view in views:
        check_rewritable(view)
        needs.check(contents_of(view))
    return views


def _plan(layouts: Mapping[str, AdapterModule], ranks: Mapping[str, int], recipe: Recipe) -> PlainLora:
    """What will be written, before it is computed."""
    needs = recipe.needs
    lora = plain_lora(
        [planned_update(layouts[name], rank, 1.0) for name, rank in ranks.items()],
        pad=recipe.pad,
        fitting_rank=needs.rank_at_least,
        integer_alpha=needs.integer_alpha,
    )
    needs.check_rank(lora.r)
    return lora


def _pieces(
    merging: Merging,
    layouts: Mapping[str, AdapterModule],
    lora: PlainLora,
    beside: Beside,
    merges: dict[str, Merged],
) -> Generator[Piece]:
    """What is written, module by module, then the tensors beside; adds the numbers of every module to `merges`."""
    for name, update, merges[name] in merging.updates():
        yield Piece(lora.written(stored_update(layouts[name], update)), name, update)
    for key, (view, info) in beside.items():
        yield Piece({key: finite_tensor(view, info)})


def _energy_kept(merges: Mapping[str, Merged]) -> float:
    total = sum(one.total for one in merges.values())
    return sum(one.kept for one in merges.values()) / total if total > 0 else 1.0


def _rows(
    present: Present,
    layouts: dict[str, AdapterModule],
    merges: dict[str, Merged],
    padded_to: int | None,
    errors: dict[str, float],
) -> tuple[MergedModule, ...]:
    return tuple(
        MergedModule(
            module_name=name,
            role=layouts[name].role,
            layer=layouts[name].layer,
            sources=len(present[name]),
            rank=one.rank,
            kept_rank=one.kept_rank,
            experts=layouts[name].experts,
            parameters=(padded_to or one.kept_rank)
            * (layouts[name].experts or 1)
            * (layouts[name].d_out + layouts[name].d_in),
            energy_kept=one.kept / one.total if one.total > 0 else 1.0,
            error=errors.get(name),
        )
        for name, one in merges.items()
    )


def _check_options(method: str, rank: int | None, energy: float | None, density: float | None) -> None:
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    if rank is not None and energy is not None:
        raise TypeError("Give `rank` or `energy`, not both.")
    if rank is not None:
        check_integer("rank", rank)
    if energy is not None:
        check_number("energy", energy, above=0, most=1)
    if method in DENSE and density is None:
        raise TypeError(f"`density` must be given for {method!r}: the share of entries that is kept.")
    if method not in DENSE and density is not None:
        raise TypeError(f"`density` is for {' and '.join(DENSE)}; {method!r} keeps all entries.")
    if density is not None:
        check_number("density", density, above=0, most=1)
