"""Ranks by measurement: probe, prior, sweep, marginal gains, redistribution, and controls at equal parameters.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, rank selection strategy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit._checks import check_number
from lorakit.allocation import ranks_from_probe
from lorakit.allocation.redistribution import allowed_parameters, matched, redistribute, shuffled_at_equal_cost
from lorakit.calibration import LossFn
from lorakit.errors import AllocationError
from lorakit.experiments._marginal_gains import (
    GroupBy,
    MarginalGains,
    check_grouping,
    groups_by,
    measured_gains,
)
from lorakit.experiments._patterns import Pattern, pattern_of
from lorakit.experiments._plan import PlanResults, Shard
from lorakit.experiments._select_advice import advice_of
from lorakit.experiments._select_plan import Arm, MissingTrainingsError, Ranks, Stages, gain
from lorakit.experiments._select_report import ArmVerdict, ComparedArm, RankSelection, SelectedModule
from lorakit.experiments._select_setup import SetOptions, batches_for, estimate_of, stages_of
from lorakit.experiments._settings import RunSettings, Schedule, distinct_integers
from lorakit.experiments._work import Source
from lorakit.fisher import FisherReport, probe
from lorakit.statistics import Verdict

if TYPE_CHECKING:
    from peft import PeftConfig

RANKS = (4, 8, 16, 64)


def select_ranks(
    base: Source,
    template: PeftConfig,
    train: Any,
    *,
    tasks: Any,
    budget: int | float | str,
    tolerance: float,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    shifted: Any = (),
    ranks: Sequence[int] = RANKS,
    by: GroupBy = "role",
    cheap: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    alpha: float = 0.05,
    num_examples: int = 16,
    loss_fn: LossFn | None = None,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: Schedule = "cosine",
    group_by_length: bool = False,
    stop_every: int | None = None,
    patience: int = 2,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    tokenizer: Any = None,
    records: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> RankSelection | PlanResults:
    """Choose the ranks of an adapter by training and comparing them on held-out sets.

    1. A Fisher probe, and from it the prior: ranks ∝ s · √(d_in + d_out).
    2. A sweep of uniform ranks; on each set, scores paired by document and seed with the best rank of that set. The
       smallest rank whose lower bounds lie above −tolerance on every set is chosen. (The best is chosen on the same
       documents, which favours it.)
    3. Gains g(r/2 → 3r/2) of one group at a time, all other modules at half the chosen rank.
    4. Ranks by greedy gain per parameter, at the chosen rank's parameters.
    5. These, the prior's, and shuffled ranks (a permutation for each seed) against uniform ranks, all within 1 % of the
       same parameters. Redistributed ranks are chosen only if they beat uniform and shuffled ones.

    Every module keeps the template's scaling throughout, and all trainings see the same data in the same order. A
    training has a record, so that the same call goes on where an earlier one stopped; ranks that several stages need
    are trained once. What all of it will take is timed and printed on stderr before the first training.

    Args:
        base: the base model, as in `rank_sweep`.
        template: a LORA or SPECLORA config without patterns.
        train: a path or dataset for `lorakit.data.loader`, what that returns, or a map-style dataset.
        tasks, shifted: in-domain and shifted sets; see `lorakit.evaluation.loss` and the functions beside it.
        budget: parameters (``2000000``, ``"2M"``), bytes as trained (``"4MB"``), or a fraction of the template's
            parameters (``0.625``).
        tolerance: how much worse than the best a rank may be on a set, in the units of the scores; a task's own margin
            wins.
        by: what shares a gain: "role", "layer", or "module", which takes a training for each module and seed.
        cheap: probe and prior only; `not_checked` says what that leaves open.
        seeds: one, or at least three. With one, bounds count documents only.
        num_examples, loss_fn: of the probe, as in `lorakit.fisher.probe`.
        stop_every, patience: compare each training on the shifted sets after so many steps, end it after `patience`
            comparisons without a better one, and keep its best parameters. None: no early stopping.
        tokenizer: of tasks and `train`; None: the one beside `base`.
        steps, batch_size, learning_rate, weight_decay, warmup_steps, schedule, group_by_length, collate_fn: as in
            `rank_sweep`.
        records, executor, shard, progress: as in `rank_sweep`. With `shard`, returns a `PlanResults` where other shards
            have not finished; call each shard again until a `RankSelection` comes back.

    Raises: ValueError, TypeError, EvaluationError for invalid arguments; AllocationError for a budget below rank 1 in
        all modules; PlanError for records of other settings; TrialError for trainings that failed.

    Example:
        >>> import lorakit
        >>> selection = lorakit.experiments.select_ranks(  # doctest: +SKIP
        ...     base, LoraConfig(r=16, target_modules="all-linear"), "train.jsonl", tasks="test.jsonl", budget="2M",
        ...     shifted="shifted.jsonl", tolerance=0.02, steps=500, batch_size=8, learning_rate=2e-4, records="runs/",
        ... )
        >>> selection.to_config()  # doctest: +SKIP
    """
    check_grouping(by)
    wanted = sorted(distinct_integers("ranks", ranks, positive=True))
    check_number("tolerance", tolerance, above=0)
    check_number("alpha", alpha, above=0, most=0.5)
    training = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "group_by_length": group_by_length,
        "weight_decay": weight_decay, "warmup_steps": warmup_steps, "schedule": schedule, "collate_fn": collate_fn,
    }  # fmt: skip
    options = SetOptions(tasks, shifted, tokenizer, stop_every, patience)
    where = RunSettings(seeds, records, executor, shard, progress)
    with stages_of(base, template, train, options, training, where) as stages:
        whole = sum(stages.costs.values())
        element = max(module.bytes_each for module in stages.modules)
        allowed = allowed_parameters(budget, stages.template.r * whole, element)
        if allowed < whole:
            raise AllocationError(
                f"`budget` must cover rank 1 in all {len(stages.modules)} modules (at least {whole} parameters); got "
                f"{allowed}. Raise it, or target fewer modules."
            )
        probed = probe(
            stages.model, batches_for(stages), target_modules=list(stages.costs), num_examples=num_examples,
            loss_fn=loss_fn, progress=progress,
        )  # fmt: skip
        selection = _Selection(stages, probed, allowed, tolerance, alpha, by)
        try:
            return selection.prior_only() if cheap else selection.run(wanted)
        except MissingTrainingsError as waiting:
            return waiting.results


@dataclass(frozen=True)
class _Selection:
    """The stages of one selection, after the probe."""

    stages: Stages
    probed: FisherReport
    allowed: int
    tolerance: float
    alpha: float
    by: GroupBy

    def prior_only(self) -> RankSelection:
        """The cheap mode: nothing is trained."""
        prior = self._prior(self.allowed)
        unchecked = (
            "whether a smaller rank is enough (no sweep)",
            "whether these ranks are better than uniform or shuffled ones (no training)",
            "any set, in-domain or shifted (nothing was scored)",
        )
        return self._report(None, prior, prior, not_checked=unchecked, verdict="INCONCLUSIVE")

    def run(self, ranks: Sequence[int]) -> RankSelection:
        """All stages."""
        base = self.stages.without_adapter()
        # The sweep, a rank that the budget may need, the gains, and four arms of which uniform may be new.
        trainings = len(self.stages.where.seeds) * (len(ranks) + 2 + len(groups_by(self.stages, self.by)) + 4)
        estimate = estimate_of(self.stages, trainings, max(ranks), base.seconds)
        sweep = self.stages.train({f"rank {rank}": self.stages.uniform(rank) for rank in ranks})
        whole = sum(self.stages.costs.values())
        largest = self.allowed // whole  # the largest uniform rank within the budget
        compared = self._sweep(sweep)
        chosen = next((row for row in compared if row.verdict == "PASS" and (row.rank or 0) <= largest), None)
        if chosen is None and f"rank {largest}" not in sweep and largest < max(ranks):
            sweep |= self.stages.train({f"rank {largest}": self.stages.uniform(largest)})
            compared = self._sweep(sweep)
            chosen = next((row for row in compared if row.verdict == "PASS" and (row.rank or 0) <= largest), None)
        fitting = [row for row in compared if (row.rank or 0) <= largest]
        if not fitting:
            raise AllocationError(
                f"`ranks` must have one that `budget` allows, at most {largest}; got {list(ranks)}. Add a smaller one."
            )
        row = chosen or fitting[-1]
        every = all(one.verdict == "FAIL" for one in fitting)
        verdict: Verdict = "PASS" if chosen else "FAIL" if every else "INCONCLUSIVE"
        rank = row.rank or 0
        patterns = {name: self._pattern(sweep, name) for name in base.sets}
        found = self._report(rank, self._prior(rank * whole), self.stages.uniform(rank), verdict=verdict)
        measured: dict[str, Any] = {"without_adapter": base.means(), "sweep": compared, "patterns": patterns}
        found = replace(found, **measured, estimate=estimate)
        return self._redistributed(found, rank, rank * whole)

    def _redistributed(self, found: RankSelection, rank: int, params: int) -> RankSelection:
        """Gains, ranks from them, and their controls at equal parameters."""
        gains: MarginalGains | None = None
        status: ArmVerdict = "nothing to redistribute"
        chosen = found.ranks
        compared: tuple[ComparedArm, ...] = ()
        unchecked: tuple[str, ...] = ()
        if rank > 1 and len(groups_by(self.stages, self.by)) > 1:
            low, delta = rank // 2, rank
            gains = measured_gains(self.stages, self.by, low, delta, self.alpha)
            arms, unchecked = self._arms(gains, found, low + delta, params)
            if len(arms) > 1:  # uniform alone is the sweep's
                trained = self.stages.train(arms)
                compared = tuple(self._compared(arm, trained, "uniform") for arm in trained.values())
            if "redistributed" in arms:
                status = self._judged(trained)
                if status == "confirmed":
                    redistributed: Any = arms["redistributed"]
                    chosen = dict(redistributed)
            elif unchecked:
                status = "not done"
        advice = advice_of(self.stages.model, self.stages.template, list(self.stages.costs), found.patterns, gains)
        return replace(
            found,
            modules=tuple(replace(row, rank=chosen[row.module_name]) for row in found.modules),
            gains=gains,
            confirmation=compared,
            redistribution=status,
            advice=advice,
            not_checked=unchecked,
        )

    def _arms(
        self, gains: MarginalGains, found: RankSelection, largest: int, params: int
    ) -> tuple[dict[str, Ranks | Sequence[Ranks]], tuple[str, ...]]:
        """The ranks to confirm, and what cannot be: "redistributed" is there only with both of its controls."""
        costs = self.stages.costs
        groups = {m.name: m.group(self.by) for m in self.stages.modules}
        by_group = {group.name: group.gain for group in gains.groups}
        uniform = self.stages.uniform(params // sum(costs.values()))
        arms: dict[str, Ranks | Sequence[Ranks]] = {"uniform": uniform}
        unchecked = []
        try:
            ranks = redistribute(by_group, groups, costs, r=gains.r, delta=gains.delta, budget=params)
            if len(set(ranks.values())) > 1:
                seeds = self.stages.where.seeds
                arms["shuffled"] = [
                    shuffled_at_equal_cost(ranks, costs, largest=largest, seed=s % 2**31, params=params) for s in seeds
                ]
                arms["redistributed"] = ranks
        except AllocationError as error:
            arms.pop("shuffled", None)
            unchecked.append(f"redistributed ranks: {error}")
        prior = {row.module_name: row.prior for row in found.modules}
        try:
            arms["prior"] = matched(prior, costs, params, largest=max(*prior.values(), largest))
        except AllocationError as error:
            unchecked.append(f"the prior at equal parameters: {error}")
        return arms, tuple(unchecked)

    def _judged(self, trained: dict[str, Arm]) -> ArmVerdict:
        ours, uniform, shuffled = (trained[name] for name in ("redistributed", "uniform", "shuffled"))
        within = [task.name for task in self.stages.sets.tasks]
        against = {name: gain(ours, uniform, name, self.alpha) for name in ours.sets}
        if any(against[name].upper < 0 for name in within):
            return "worse"
        kept = all(one.lower > -self._margin(name) for name, one in against.items())
        each = self.alpha / len(within)  # Bonferroni: one set of several is enough
        better = any(min(gain(ours, other, n, each).lower for other in (uniform, shuffled)) > 0 for n in within)
        return "confirmed" if kept and better else "not confirmed"

    def _sweep(self, arms: dict[str, Arm]) -> tuple[ComparedArm, ...]:
        """Each rank against the best of each set, in order of rank."""
        means = {arm.name: arm.means() for arm in arms.values()}
        best = {name: max(means, key=lambda arm: means[arm][name]) for name in self._names()}
        rows = [self._against(arm, arms, best) for arm in arms.values()]
        return tuple(sorted(rows, key=lambda row: row.rank or 0))

    def _compared(self, arm: Arm, arms: dict[str, Arm], reference: str) -> ComparedArm:
        return replace(self._against(arm, arms, dict.fromkeys(self._names(), reference)), reference=reference)

    def _against(self, arm: Arm, arms: dict[str, Arm], best: dict[str, str]) -> ComparedArm:
        found = {name: gain(arm, arms[best[name]], name, self.alpha) for name in self._names()}
        passed = all(best[n] == arm.name or one.lower > -self._margin(n) for n, one in found.items())
        failed = any(one.upper < -self._margin(name) for name, one in found.items())
        rank = int(arm.name.removeprefix("rank ")) if arm.name.startswith("rank ") else None
        verdict: Verdict = "PASS" if passed else "FAIL" if failed else "INCONCLUSIVE"
        return ComparedArm(arm.name, rank, arm.params, arm.means(), "best of each set", found, verdict, arm.steps)

    def _pattern(self, arms: dict[str, Arm], name: str) -> Pattern | None:
        rows = sorted(arms.values(), key=lambda arm: arm.params)

        def stderr(i: int, j: int) -> float | None:
            return getattr(gain(rows[i], rows[j], name, self.alpha), "standard_error", None)

        return pattern_of([-arm.means()[name] for arm in rows], stderr, least=self._margin(name))

    def _prior(self, params: int) -> dict[str, int]:
        return ranks_from_probe(self.probed, params=params, rule="prior", r=self.stages.template.r).ranks

    def _names(self) -> list[str]:
        return [task.name for task in (*self.stages.sets.tasks, *self.stages.sets.shifted)]

    def _margin(self, name: str) -> float:
        own = {task.name: task.margin for task in (*self.stages.sets.tasks, *self.stages.sets.shifted)}[name]
        return self.tolerance if own is None else own

    def _report(
        self, rank: int | None, prior: Ranks, ranks: Ranks, *, verdict: Verdict, not_checked: tuple[str, ...] = ()
    ) -> RankSelection:
        fisher = {row.module_name: row.fisher for row in self.probed.modules}
        rows = [
            SelectedModule(m.name, m.role, m.cost, fisher[m.name], prior[m.name], ranks[m.name])
            for m in self.stages.modules
        ]
        return RankSelection(
            verdict=verdict,
            rank=rank,
            budget=self.allowed,
            tolerance=self.tolerance,
            alpha=self.alpha,
            seeds=tuple(self.stages.where.seeds),
            in_domain=tuple(task.name for task in self.stages.sets.tasks),
            shifted=tuple(task.name for task in self.stages.sets.shifted),
            without_adapter={},
            modules=tuple(rows),
            sweep=(),
            patterns={},
            gains=None,
            confirmation=(),
            redistribution="not done",
            advice=(),
            not_checked=not_checked,
            estimate=None,
            template=self.stages.template,
        )
