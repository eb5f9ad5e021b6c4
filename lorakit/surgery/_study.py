"""Many edits of one adapter from one calibration pass: what each gains on its task, and what others pay for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel

from lorakit._checks import check_integer, check_number, check_seed
from lorakit._distributed.fsdp import unwrapped
from lorakit.adapters.in_model import resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import no_inference_mode, preserved_rng
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.evaluation import Scores, compare
from lorakit.evaluation.comparison import Question
from lorakit.surgery._policies import ENERGIES, Policy, RandomIndex, resolve_policy
from lorakit.surgery._refine import REFINE_POLICIES, tokenizer_of
from lorakit.surgery._reweight import Plan, plan_edit
from lorakit.surgery._scoring import Scoring, bar_of, unused
from lorakit.surgery._select import select_modules
from lorakit.surgery._sensitivity import Measured, measure
from lorakit.surgery._splits import batches_of, hashes_of
from lorakit.surgery._study_report import StudiedEdit, StudyReport


@dataclass(frozen=True)
class _Cell:
    """One edit to make: a policy and seed on a part of the pass."""

    policy: str
    rule: Policy
    seed: int
    num_examples: int
    modules: str
    energy: str
    control: bool


@no_inference_mode()
def study(
    adapter: PeftModel,
    loader: Any,
    *,
    task: Any,
    guards: Any = (),
    policies: Sequence[str | Policy] = REFINE_POLICIES,
    seeds: Sequence[int] = (0,),
    sizes: Sequence[int] = (128,),
    module_sets: Mapping[str, str | Sequence[str] | None] | None = None,
    energies: Sequence[str] = ("l1",),
    controls: int = 20,
    alpha: float = 0.05,
    limit: int | None = None,
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> StudyReport:
    """Edit an adapter in every way asked for, from one calibration pass, and score each edit; nothing is kept.

    Every policy × seed × size × module set × energy is an edit, as `reweight` would make it on those examples and
    modules. Its gain on `task` and its change on the guards are paired differences from the adapter. The controls of
    each module set and energy are `controls` draws of `random_index`, so that edits can be seen beside chance.

    Args:
        adapter, loader, loss_fn, adapter_name, tokenizer, progress: as in `sensitivity`.
        task, guards, limit: as in `refine`; a guard here is only measured.
        policies: names or policy objects.
        seeds: a seed draws which of the pass's examples an edit calibrates on, where it is fewer than all of them, and
            is that of policies that draw. Edits that do not depend on it are scored once.
        sizes: numbers of calibration examples; the pass takes the largest.
        module_sets: by name, what `target_modules` of `sensitivity` takes; None: its default, named "default".
        energies: what is preserved: "l1", "l2", "none".
        controls: random edits a module set and energy; at least 20.
        alpha: the level of each one-sided bound. These are of single edits, and not corrected for how many there are.
    Returns: a report with one row an edit; `plot()` shows gain against the change on the guards.
    Raises: as `reweight` and `lorakit.evaluation.evaluate`; EvaluationError where calibration documents are scored.
        Whatever is raised, and at the end, the adapter is bit for bit as it was.
    Reference: Tian et al., "Spectral Surgery", 2026, Fig. 4.
    """
    check_integer("controls", controls, least=20)
    check_number("alpha", alpha, above=0, most=0.5)
    named = [(p if isinstance(p, str) else repr(p), resolve_policy(p)) for p in policies]
    counts = sorted({check_integer("sizes", size) for size in sizes})
    drawn = [check_seed("seeds", seed) for seed in seeds]
    _check_not_empty(named, counts, drawn, energies)
    question = Question(tasks=task, margin=1.0, alpha=alpha, guards=guards, limit=limit, progress=False)
    if len(question.wanted) - len(question.guarded) != 1:
        raise EvaluationError("`task` must be one task; pass the others as `guards`.")
    adapter = unwrapped(adapter)
    name = resolve_adapter_name(adapter, adapter_name)
    sets = {"default": None} if module_sets is None else dict(module_sets)
    chosen = {key: {m.name for m in select_modules(adapter, name, value)} for key, value in sets.items()}
    if not chosen:
        raise ValueError("`module_sets` must not be empty.")
    batches = batches_of(adapter, loader, tokenizer, num_examples=counts[-1], progress=progress)
    union = sorted(set().union(*chosen.values()))
    how: dict[str, Any] = {"target_modules": union, "loss_fn": loss_fn, "adapter_name": name, "progress": progress}
    measured = measure(adapter, batches, num_examples=counts[-1], **how)
    available = measured.collected.num_examples
    if available < counts[-1]:
        raise SurgeryError(f"`sizes` asks for {counts[-1]} examples with labels; `loader` has {available}.")
    scoring = Scoring(adapter, name, unused(question, hashes_of(batches)), tokenizer_of(adapter, tokenizer))
    asked = itertools.product(named, drawn, counts, chosen, energies)
    edits = [_Cell(policy, rule, seed, size, key, energy, False) for (policy, rule), seed, size, key, energy in asked]
    random = itertools.product(chosen, energies, range(controls))
    edits += [_Cell("random_index", RandomIndex(), seed, available, key, norm, True) for key, norm, seed in random]
    with preserved_rng(adapter):
        rows, estimate = _scored(edits, measured, chosen, scoring, progress=progress)
    return StudyReport(
        model_name=measured.model_name,
        adapter_name=name,
        task=question.wanted[0].name,
        guards=tuple(one.name for one in question.wanted[1:]),
        alpha=alpha,
        edits=tuple(row for row in rows if not row.control),
        controls=tuple(row for row in rows if row.control),
        estimated_seconds=estimate,
        seconds=scoring.spent,
    )


def _check_not_empty(policies: Any, sizes: Any, seeds: Any, energies: Sequence[str]) -> None:
    if not (policies and sizes and seeds and energies):
        raise ValueError("`policies`, `seeds`, `sizes` and `energies` must not be empty.")
    for energy in energies:
        if energy not in ENERGIES:
            raise ValueError(f"`energies` must be of {', '.join(ENERGIES)}; got {energy!r}.")


def _scored(
    edits: Sequence[_Cell], measured: Measured, chosen: Mapping[str, set[str]], scoring: Scoring, *, progress: bool
) -> tuple[list[StudiedEdit], float]:
    """A row for each edit, and how many seconds that was said to take; equal edits are scored once."""
    question, available = scoring.question, measured.collected.num_examples
    before = scoring(question.wanted)
    estimate = len(edits) * scoring.spent
    known: dict[Any, dict[str, Scores]] = {}
    rows = []
    with bar_of(len(edits), estimate, progress=progress) as bar:
        for cell in edits:
            examples = drawn_examples(cell.seed, cell.num_examples, available)
            plan = _plan(measured, cell, examples, chosen[cell.modules])
            key = tuple((row.module_name, tuple(row.edited_singular_values)) for row, _ in plan)
            if key not in known:
                known[key] = scoring(question.wanted, [backup for _, backup in plan])
            rows.append(_row(cell, examples, question, before, known[key], question.alpha))
            bar.update()
    return rows, estimate


def drawn_examples(seed: int, size: int, available: int) -> list[int]:
    """Which of the pass's examples an edit calibrates on, in order: all of them, or a draw of `size`."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:size].tolist())


def _plan(measured: Measured, cell: _Cell, examples: Sequence[int], names: set[str]) -> Plan:
    """The edit that a pass over these examples and modules alone would make."""
    parts = [
        (item, g[torch.tensor(examples, device=g.device)])
        for item, g in zip(measured.modules, measured.per_example, strict=True)
        if item.module.name in names
    ]
    parts = [(item, g) for item, g in parts if bool(g.any())]  # modules that matter to none of them are left alone
    part = replace(measured, modules=[item for item, _ in parts], per_example=[g for _, g in parts])
    generator = torch.Generator().manual_seed(cell.seed)
    return plan_edit(part, cell.rule, cell.rule.aggregate, cell.energy, generator)


def _row(
    cell: _Cell,
    examples: Sequence[int],
    question: Question,
    before: Mapping[str, Scores],
    after: Mapping[str, Scores],
    alpha: float,
) -> StudiedEdit:
    found = {one.name: compare(before[one.name], after[one.name], alpha=alpha) for one in question.wanted}
    own = found[question.wanted[0].name]
    return StudiedEdit(
        policy=cell.policy,
        seed=cell.seed,
        num_examples=cell.num_examples,
        modules=cell.modules,
        energy=cell.energy,
        control=cell.control,
        examples=tuple(examples),
        score=after[question.wanted[0].name].mean,
        gain=own.difference,
        lower=own.lower,
        upper=own.upper,
        guard_changes={one.name: found[one.name].difference for one in question.wanted[1:]},
    )
