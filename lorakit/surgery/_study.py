"""Many edits of one adapter from one calibration pass: what each gains on its task, and what others pay for it."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel

from lorakit._checks import check_integer, check_number, check_seed
from lorakit.adapters import open_adapter
from lorakit.adapters.in_model import resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import no_inference_mode, preserved_rng
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.evaluation import LoadOptions, Scores, Task, compare
from lorakit.evaluation._digests import adapter_digest, base_digest, tokenizer_digest
from lorakit.evaluation.comparison import Question
from lorakit.surgery._edit import Backup
from lorakit.surgery._live import live
from lorakit.surgery._policies import ENERGIES, Policy, RandomIndex, resolve_policy
from lorakit.surgery._refine import REFINE_POLICIES
from lorakit.surgery._reweight import Plan, plan_edit, policy_rows
from lorakit.surgery._scoring import Scoring, bar_of, unused
from lorakit.surgery._select import select_modules
from lorakit.surgery._sensitivity import Measured, measure, measured_before
from lorakit.surgery._splits import batches_of, hashes_of
from lorakit.surgery._study_records import SavedPass, StudyRecords
from lorakit.surgery._study_report import StudiedEdit, StudyReport

_UNEDITED = "unedited"


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

    @property
    def label(self) -> str:
        """What it is, for who reads its records."""
        return f"{self.policy}, seed {self.seed}, {self.num_examples} examples, {self.modules}, {self.energy}"


@no_inference_mode()
def study(
    adapter: PeftModel | str | os.PathLike[str],
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
    base: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    records: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> StudyReport:
    """Edit an adapter in every way asked for, from one calibration pass, and score each edit; nothing is kept.

    Every policy × seed × size × module set × energy is an edit, as `reweight` would make it on those examples and
    modules. Its gain on `task` and its change on the guards are paired differences from the adapter. The controls of
    each module set and energy are `controls` draws of `random_index`, so that edits can be seen beside chance.

    How many edits are left to score, and how long that will take, is said on stderr before the first one. Edits that
    are equal are scored once: where a size is all of the pass, seeds change only policies that draw.

    Args:
        adapter, base, options: as in `refine`.
        loader, loss_fn, adapter_name, tokenizer, progress: as in `sensitivity`.
        task, guards, limit: as in `refine`; a guard here is only measured.
        policies: names or policy objects.
        seeds: a seed draws which of the pass's examples an edit calibrates on, where it is fewer than all of them, and
            is that of policies that draw.
        sizes: numbers of calibration examples; the pass takes the largest.
        module_sets: by name, what `target_modules` of `sensitivity` takes; None: its default, named "default".
        energies: what is preserved: "l1", "l2", "none".
        controls: random edits a module set and energy; at least 20.
        alpha: the level of each one-sided bound. These are of single edits, and not corrected for how many there are.
        records: a directory that keeps the pass, and every edit's scores on each task as soon as they are known: after
            an interruption the same call goes on. A call with other policies, seeds, sizes, module sets, energies,
            guards or controls scores only what is new. What `loss_fn` and `function` tasks compute cannot be seen: take
            another directory where they change.
    Returns: a report with one row an edit; `plot()` shows gain against the drop on each guard.
    Raises: as `reweight` and `lorakit.evaluation.evaluate`; EvaluationError where calibration documents are scored;
        PlanError for records of another adapter, base model or task.
        Whatever is raised, and at the end, the adapter is bit for bit as it was.
    Reference: Tian et al., "Spectral Surgery", 2026, Fig. 4.
    """
    check_integer("controls", controls, least=20)
    check_number("alpha", alpha, above=0, most=0.5)
    named = [(p if isinstance(p, str) else repr(p), resolve_policy(p)) for p in policies]
    counts = sorted({check_integer("sizes", size) for size in sizes})
    drawn = sorted({check_seed("seeds", seed) for seed in seeds})
    _check_not_empty(named, counts, drawn, energies)
    question = Question(tasks=task, margin=1.0, alpha=alpha, guards=guards, limit=limit, progress=False)
    if len(question.wanted) - len(question.guarded) != 1:
        raise EvaluationError("`task` must be one task; pass the others as `guards`.")
    given = live(adapter, base, options, tokenizer)
    name = resolve_adapter_name(given.model, adapter_name)
    sets = {"default": None} if module_sets is None else dict(module_sets)
    chosen = {key: {m.name for m in select_modules(given.model, name, value)} for key, value in sets.items()}
    if not chosen:
        raise ValueError("`module_sets` must not be empty.")
    batches = batches_of(given.model, loader, given.tokenizer, num_examples=counts[-1], progress=progress)
    documents = hashes_of(batches)
    scoring = Scoring(given.model, name, unused(question, documents), given.task_tokenizer)
    common = {} if records is None else _identity(scoring)
    union = sorted(set().union(*chosen.values()))
    saved = None if records is None else SavedPass(records, [common, documents, union])
    measured = _measured(scoring, batches, counts[-1], union, loss_fn, saved, progress=progress)
    cells = _cells(named, drawn, counts, list(chosen), energies, controls)
    with preserved_rng(given.model):
        edits = _Edits(measured, chosen, cells)
        kept = StudyRecords(records, {_UNEDITED, *edits.digests}, question.wanted, common)
        rows, estimate = edits.scored(scoring, kept, progress=progress)
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


def _cells(
    policies: Sequence[tuple[str, Policy]],
    seeds: Sequence[int],
    sizes: Sequence[int],
    modules: Sequence[str],
    energies: Sequence[str],
    controls: int,
) -> list[_Cell]:
    """The edits, and after them the controls, which calibrate on all examples."""
    asked = itertools.product(policies, seeds, sizes, modules, energies)
    edits = [_Cell(policy, rule, seed, size, key, energy, False) for (policy, rule), seed, size, key, energy in asked]
    drawn = itertools.product(modules, energies, range(controls))
    rule = RandomIndex()
    return edits + [_Cell("random_index", rule, seed, sizes[-1], key, energy, True) for key, energy, seed in drawn]


def _check_not_empty(policies: Any, sizes: Any, seeds: Any, energies: Sequence[str]) -> None:
    if not (policies and sizes and seeds and energies):
        raise ValueError("`policies`, `seeds`, `sizes` and `energies` must not be empty.")
    for energy in energies:
        if energy not in ENERGIES:
            raise ValueError(f"`energies` must be of {', '.join(ENERGIES)}; got {energy!r}.")


def _identity(scoring: Scoring) -> dict[str, Any]:
    """What all scores of a study depend on, as hashes."""
    return {
        "adapter": adapter_digest(open_adapter(scoring.adapter, adapter_name=scoring.adapter_name)),
        "base": base_digest(scoring.adapter),
        "tokenizer": tokenizer_digest(scoring.tokenizer),
        "device": next(scoring.adapter.parameters()).device.type,
        "limit": scoring.question.limit,
    }


def _measured(
    scoring: Scoring,
    batches: Sequence[Any],
    count: int,
    modules: Sequence[str],
    loss_fn: LossFn | None,
    saved: SavedPass | None,
    *,
    progress: bool,
) -> Measured:
    """The pass over the calibration examples, or the one that was saved. Raises: SurgeryError."""
    before = None if saved is None else saved.read()
    if before is not None:
        return measured_before(scoring.adapter, scoring.adapter_name, modules, before)
    how: dict[str, Any] = {"target_modules": modules, "loss_fn": loss_fn, "adapter_name": scoring.adapter_name}
    measured = measure(scoring.adapter, batches, num_examples=count, progress=progress, **how)
    available = measured.collected.num_examples
    if available < count:
        raise SurgeryError(f"`sizes` asks for {count} examples with labels; `loader` has {available}.")
    if saved is not None:
        saved.write(measured.collected)
    return measured


class _Edits:
    """The edits of a study, from sensitivities that are measured already."""

    def __init__(self, measured: Measured, chosen: Mapping[str, set[str]], cells: Sequence[_Cell]) -> None:
        self.measured, self.chosen, self.cells = measured, chosen, cells
        self.digests = [self._digest(cell) for cell in cells]

    def scored(self, scoring: Scoring, records: StudyRecords, *, progress: bool) -> tuple[list[StudiedEdit], float]:
        """A row for each edit, and how many seconds that was said to take; equal edits are scored once."""
        tasks = scoring.question.wanted

        def score(edit: str, task: Task, label: str, backups: Sequence[Backup] = ()) -> tuple[Scores, float]:
            known = records.read(edit, task)
            if known is None:
                known = scoring([task], backups)[task.name], scoring.seconds[task.name]
                records.write(edit, task, *known, made_by=label)
            scoring.question.check_unused({task.name: known[0]})
            return known

        before = {task.name: score(_UNEDITED, task, _UNEDITED) for task in tasks}
        left = [task for edit in dict.fromkeys(self.digests) for task in tasks if records.read(edit, task) is None]
        estimate = sum(before[task.name][1] for task in left)
        reference = {name: scores for name, (scores, _) in before.items()}
        rows = []
        with bar_of(len(left), estimate, progress=progress) as bar:
            for cell, edit in zip(self.cells, self.digests, strict=True):
                missing = [task for task in tasks if records.read(edit, task) is None]
                backups = [backup for _, backup in self._plan(cell)] if missing else []
                after = {task.name: score(edit, task, cell.label, backups)[0] for task in tasks}
                rows.append(self._row(cell, scoring.question, reference, after))
                bar.update(len(missing))
        return rows, estimate

    def _part(self, cell: _Cell) -> Measured:
        """What a pass over an edit's examples and modules alone would have measured."""
        chosen = torch.tensor(drawn_examples(cell.seed, cell.num_examples, self.measured.collected.num_examples))
        parts = [
            (item, g[chosen.to(g.device)])
            for item, g in zip(self.measured.modules, self.measured.per_example, strict=True)
            if item.module.name in self.chosen[cell.modules]
        ]
        parts = [(item, g) for item, g in parts if bool(g.any())]  # modules that matter to none of them are left alone
        return replace(self.measured, modules=[item for item, _ in parts], per_example=[g for _, g in parts])

    def _plan(self, cell: _Cell) -> Plan:
        return plan_edit(self._part(cell), cell.rule, cell.rule.aggregate, cell.energy, _generator(cell))

    def _digest(self, cell: _Cell) -> str:
        """A hash of what an edit does, to six digits, so that rounding does not make it another one."""
        total = hashlib.sha256()
        for row in policy_rows(self._part(cell), cell.rule, cell.rule.aggregate, cell.energy, _generator(cell)):
            values = " ".join(f"{value:.6g}" for value in row.edited_singular_values)
            total.update(f"{row.module_name} {values};".encode())
        return total.hexdigest()

    def _row(
        self, cell: _Cell, question: Question, before: Mapping[str, Scores], after: Mapping[str, Scores]
    ) -> StudiedEdit:
        found = {one.name: compare(before[one.name], after[one.name], alpha=question.alpha) for one in question.wanted}
        own = found[question.wanted[0].name]
        return StudiedEdit(
            policy=cell.policy,
            seed=cell.seed,
            num_examples=cell.num_examples,
            modules=cell.modules,
            energy=cell.energy,
            control=cell.control,
            examples=tuple(drawn_examples(cell.seed, cell.num_examples, self.measured.collected.num_examples)),
            score=after[question.wanted[0].name].mean,
            gain=own.difference,
            lower=own.lower,
            upper=own.upper,
            guard_changes={one.name: found[one.name].difference for one in question.wanted[1:]},
        )


def drawn_examples(seed: int, size: int, available: int) -> list[int]:
    """Which of the pass's examples an edit calibrates on, in order: all of them, or a draw of `size`."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:size].tolist())


def _generator(cell: _Cell) -> torch.Generator:
    return torch.Generator().manual_seed(cell.seed)
