"""An edit that is kept only if it is better than the adapter, better than chance, and no guard is worse."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from lorakit._checks import check_integer, check_number, check_seed
from lorakit.adapters.in_model import resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import no_inference_mode, preserved_rng
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.evaluation import CertifiedTask, LoadOptions, Scores
from lorakit.evaluation._certified_task import evidence_of
from lorakit.evaluation._task_kinds import Task
from lorakit.evaluation.comparison import Question
from lorakit.statistics import Verdict, control_p_value
from lorakit.surgery._edit import Backup, exchange
from lorakit.surgery._live import live
from lorakit.surgery._policies import ENERGIES, Aggregate, Policy, resolve_policy
from lorakit.surgery._refine_report import RefineCandidate, RefineReport
from lorakit.surgery._restore import SCALES, RestoreSettings, restore
from lorakit.surgery._restore_report import RestoreReport
from lorakit.surgery._reweight import Plan, edit_report, plan_edit, plan_of
from lorakit.surgery._scoring import Scoring, bar_of, selection_task, unused
from lorakit.surgery._sensitivity import Measured, measure
from lorakit.surgery._singular_value_probe import Decomposed
from lorakit.surgery._splits import split

REFINE_POLICIES = ("smooth_abs", "abs_select", "grad_direction")


@dataclass(frozen=True)
class Strengthened:
    """A policy whose gates σ′/σ are raised to a power."""

    policy: Policy
    strength: float

    @property
    def aggregate(self) -> Aggregate:
        """The policy's own."""
        return self.policy.aggregate

    def __call__(self, singular_values: Tensor, sensitivity: Tensor, *, generator: torch.Generator) -> Tensor:
        proposed = self.policy(singular_values, sensitivity, generator=generator)
        if self.strength == 1:
            return proposed
        zero = singular_values == 0
        gate = proposed.clamp(min=0) / singular_values.masked_fill(zero, 1)
        return torch.where(zero, proposed, singular_values * gate**self.strength)


@no_inference_mode()
def refine(
    adapter: PeftModel | str | os.PathLike[str],
    loader: Any,
    *,
    task: Any,
    guards: Any = (),
    margin: float = 0.01,
    policies: Sequence[str | Policy] = REFINE_POLICIES,
    strengths: Sequence[float] = (0.5, 1, 2),
    controls: int = 19,
    alpha: float = 0.05,
    selection: Any = None,
    num_examples: int = 128,
    num_selection: int = 128,
    target_modules: str | Sequence[str] | None = None,
    preserve_energy: Literal["l1", "l2", "none"] | None = "l1",
    limit: int | None = None,
    groups: Mapping[str, Sequence[Any]] | None = None,
    used_documents: Sequence[str] = (),
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    base: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    seed: int = 0,
    progress: bool = True,
    objective: Literal["improve", "restore"] = "improve",
    base_text: Any = None,
    scales: Sequence[float] = SCALES,
    top_k: int = 10,
    intruder_below: float = 0.5,
) -> RefineReport | RestoreReport:
    """Reweight an adapter's singular values, and keep the edit only if it passes; else all is bit for bit as it was.

    One pass over calibration examples gives the sensitivities for every policy. Each policy at each strength (its
    gates raised to that power) is a candidate; the one of least loss on the selection examples is chosen. It is then
    scored once on the documents of `task`, and so are `controls` edits with the same gates on components that are drawn
    at random within each module. The edit is kept if

    * the lower bound of its gain over the adapter exceeds 0 (one-sided, at `alpha`),
    * p = (1 + #{control ≥ edit}) / (controls + 1) is at most `alpha`, and
    * on every guard it is no worse than the margin allows.

    The documents of calibration, selection and certification are disjoint; that is checked by hash for tokens that are
    the same, and cannot be seen for tasks of lm-evaluation-harness, whose documents have other hashes. How long it will
    take is said on stderr, before the first candidate is scored.

    Args:
        adapter, target_modules, num_examples, loss_fn, adapter_name, tokenizer, base, options, progress: see
            `sensitivity`. An adapter on disk is edited in memory; the report's `save` writes it, if it is kept.
        loader: its first `num_examples` examples calibrate; the next `num_selection` choose, unless `selection` is
            given, which is a loader or source of its own.
        task: what to be better on: as in `lorakit.evaluation.certify`.
        guards, margin: tasks that must not be worse by more than their own margin or, where they have none, `margin`,
            in the units of their scores.
        policies: names or policy objects. By default the paper's: smooth_abs, its default and of least risk;
            abs_select, the same by hard selection; and grad_direction, the only one that uses the sign, with the
            largest gains and the largest harm. The other names are variants of these, and each candidate more costs
            scorings and makes the best of the selection more a matter of luck.
        strengths: positive powers; preserve_energy: see `reweight`.
        controls: how many; p ≤ 0.05 takes at least 19.
        limit, groups, used_documents: as in `lorakit.evaluation.certify`.
        seed: of policies and controls.
        objective: "restore" does not reweight. It shrinks the intruder directions in the outputs of the tuned weights
            by each of `scales`, and reports the frontier of the task against `base_text` (a loss task, or a source or
            batches of text that the base model is good at). From mild to strong, for as long as task and guards are
            non-inferior, the scale with the largest lower bound of the gain on base text is kept, if that bound is
            above 0 at alpha / len(scales) and p is at most `alpha`: each control shrinks, by the same scales, as many
            components of each module's update, drawn from those that carry the intruders least, and its largest bound
            counts. `loader` and policies are not used: pass None.
        top_k, intruder_below: as in `lorakit.lens.compare_weights`.
    Returns: a `RefineReport`, or for "restore" a `RestoreReport`; both have `kept`, `reasons`, `undo()` and
        `save(directory)`.
    Raises: as `reweight` and `certify`; EvaluationError where splits share documents; SurgeryError for too few
        examples. Whatever is raised, Ctrl-C included, the adapter is bit for bit as it was.
    Reference: Tian et al., "Spectral Surgery", 2026; Phipson and Smyth 2010 for p.

    Example:
        >>> report = lorakit.surgery.refine(model, "train.jsonl", task="test.jsonl", guards=[other])  # doctest: +SKIP
        >>> report.kept or report.reasons  # doctest: +SKIP
    """
    energy = _checked_energy(preserve_energy)
    check_integer("num_selection", num_selection)
    _check_objective(objective)
    _check_controls(controls, alpha)
    candidates = _candidates(policies, strengths)
    seed = check_seed("seed", seed)
    asked: dict[str, Any] = {"groups": groups, "limit": limit, "used_documents": used_documents, "progress": False}
    question = Question(tasks=task, margin=margin, alpha=alpha, guards=guards, **asked)
    if len(question.wanted) - len(question.guarded) != 1:
        raise EvaluationError("`task` must be one task; pass what must not become worse as `guards`.")
    given = live(adapter, base, options, tokenizer)
    if objective == "restore":
        kinds: dict[str, Any] = {"target_modules": target_modules, "top_k": top_k, "intruder_below": intruder_below}
        how = RestoreSettings(base_text=base_text, scales=scales, controls=controls, seed=seed, **kinds)
        name = resolve_adapter_name(given.model, adapter_name)
        return restore(Scoring(given.model, name, question, given.task_tokenizer, given.source), how, progress=progress)
    counts = {"num_examples": num_examples, "num_selection": num_selection}
    parts = split(given.model, loader, selection, given.tokenizer, progress=progress, **counts)
    selected: dict[str, Any] = {"target_modules": target_modules, "adapter_name": adapter_name, "loss_fn": loss_fn}
    measured = measure(given.model, parts.calibration, num_examples=num_examples, progress=progress, **selected)
    if not measured.modules:
        raise SurgeryError("No selected module has a singular component that affects the loss: nothing can be refined.")
    question = unused(question, parts.documents)
    scoring = Scoring(given.model, measured.adapter_name, question, given.task_tokenizer, given.source)
    search = _Search(measured, scoring, energy, seed, controls, alpha)
    with preserved_rng(given.model):
        return search.run(candidates, selection_task(parts.selection, loss_fn), progress=progress)


class _Search:
    """The decision, from sensitivities that are measured already."""

    def __init__(
        self, measured: Measured, scoring: Scoring, energy: str, seed: int, controls: int, alpha: float
    ) -> None:
        self.measured, self.scoring, self.energy = measured, scoring, energy
        self.seed, self.controls, self.alpha = seed, controls, alpha

    def plan(self, candidate: tuple[str, Strengthened]) -> Plan:
        _, policy = candidate
        generator = torch.Generator().manual_seed(self.seed)
        return plan_edit(self.measured, policy, policy.aggregate, self.energy, generator)

    def permuted(self, chosen: Plan, aggregate: Aggregate, generator: torch.Generator) -> Plan:
        """The chosen edit's gates on components drawn at random within each module."""
        gates = {row.module_name: torch.tensor(row.gate, dtype=torch.float64) for row, _ in chosen}

        def propose(item: Decomposed, g: Tensor) -> Tensor:
            gate = gates[item.module.name]
            order = torch.randperm(len(gate), generator=generator)
            return item.S.detach().double().cpu() * gate[order]

        return plan_of(self.measured, propose, aggregate, self.energy)

    def run(self, candidates: Sequence[tuple[str, Strengthened]], selecting: Task, *, progress: bool) -> RefineReport:
        scoring, question = self.scoring, self.scoring.question
        task, *guards = question.wanted
        choice = replace(question, used_documents=(), limit=None)
        chooser = Scoring(scoring.adapter, scoring.adapter_name, choice, scoring.tokenizer)
        before = chooser([selecting])[selecting.name]
        reference = scoring([task, *guards])
        times = scoring.seconds
        estimate = len(candidates) * chooser.seconds[selecting.name] + (1 + self.controls) * times[task.name]
        estimate += sum(times[guard.name] for guard in guards)
        with bar_of(len(candidates) + 1 + self.controls, estimate, progress=progress) as bar:
            tried = []
            for name, policy in candidates:
                score = chooser([selecting], _backups(self.plan((name, policy))))[selecting.name].mean
                tried.append(RefineCandidate(name, policy.strength, score, before.mean))
                bar.update()
            best = max(range(len(tried)), key=lambda i: tried[i].score)
            common: dict[str, Any] = {
                "model_name": self.measured.model_name,
                "adapter_name": self.measured.adapter_name,
                "policy": tried[best].policy,
                "strength": tried[best].strength,
                "alpha": self.alpha,
                "num_examples": self.measured.collected.num_examples,
                "num_selection": len(before.scores),
                "candidates": tuple(tried),
                "seed": self.seed,
                "estimated_seconds": estimate,
            }
            if tried[best].gain <= 0:
                spent = scoring.spent + chooser.spent
                return RefineReport(**common, **_nothing_chosen(tried[best].gain), seconds=spent)
            plan = self.plan(candidates[best])
            decided = self.certified(plan, candidates[best][1].aggregate, reference, bar)
        return self.decided(plan, candidates[best], common | decided, scoring.spent + chooser.spent)

    def certified(self, plan: Plan, aggregate: Aggregate, reference: Mapping[str, Scores], bar: Any) -> dict[str, Any]:
        """The chosen edit, and its controls, on the documents of the task and of the guards."""
        task, *guards = self.scoring.question.wanted
        found = self.scoring([task, *guards], _backups(plan))
        bar.update()
        result, *guarded = (self._result(one, reference, found) for one in (task, *guards))
        generator = torch.Generator().manual_seed(self.seed)
        differences = []
        for _ in range(self.controls):
            control = self.scoring([task], _backups(self.permuted(plan, aggregate, generator)))
            differences.append(self._result(task, reference, control).difference)
            bar.update()
        p = control_p_value(result.difference, differences)
        reasons = _reasons(result, guarded, p, self.alpha)
        return {
            "kept": not reasons,
            "verdict": _verdict(result, guarded, bool(reasons)),
            "reasons": tuple(reasons),
            "task": result,
            "guards": tuple(guarded),
            "controls": tuple(differences),
            "p_value": p,
        }

    def decided(
        self, plan: Plan, candidate: tuple[str, Strengthened], found: dict[str, Any], seconds: float
    ) -> RefineReport:
        """The report, with the edit in the adapter if it is kept."""
        name, policy = candidate
        edit = None
        if found["kept"]:
            edit = edit_report(
                self.scoring.adapter,
                self.measured,
                plan,
                aggregate=policy.aggregate,
                edit_id=uuid.uuid4().hex,
                policy=name,
                policy_parameters={"strength": policy.strength},
                preserve_energy=self.energy,
                seed=self.seed,
                _source=self.scoring.source,
            )
        report = RefineReport(**found, seconds=seconds, edit=edit)
        if report.kept:
            exchange(_backups(plan))
        return report

    def _result(self, task: Task, reference: Mapping[str, Scores], found: Mapping[str, Scores]) -> CertifiedTask:
        question = self.scoring.question
        return evidence_of(
            [reference[task.name]],
            [found[task.name]],
            name=task.name,
            margin=question.margins[task.name],
            alpha=self.alpha,
            groups=(question.groups or {}).get(task.name),
            guard=task.name in question.guarded,
        ).certified(self.alpha, None)


def _nothing_chosen(gain: float) -> dict[str, Any]:
    reason = f"no candidate has a lower loss than the adapter on the selection examples (best {gain:+.4g})"
    nothing: dict[str, Any] = {"task": None, "guards": (), "controls": (), "p_value": None, "edit": None}
    return nothing | {"kept": False, "verdict": "INCONCLUSIVE", "reasons": (reason,)}


def _checked_energy(preserve_energy: str | None) -> str:
    energy = "none" if preserve_energy is None else preserve_energy
    if energy not in ENERGIES:
        raise ValueError(f"`preserve_energy` must be one of {', '.join(ENERGIES)}; got {preserve_energy!r}.")
    return energy


def _check_objective(objective: str) -> None:
    if objective not in ("improve", "restore"):
        raise ValueError(f'`objective` must be "improve" or "restore"; got {objective!r}.')


def _check_controls(controls: int, alpha: float) -> None:
    check_integer("controls", controls)
    if (1 / (controls + 1)) > alpha:
        least = -(-1 // alpha) - 1
        raise ValueError(f"`controls` must be at least {least:.0f} for p ≤ {alpha:g} to be possible; got {controls}.")


def _candidates(policies: Sequence[str | Policy], strengths: Sequence[float]) -> list[tuple[str, Strengthened]]:
    for strength in strengths:
        check_number("strengths", strength, above=0)
    found = [
        (policy if isinstance(policy, str) else repr(policy), Strengthened(resolve_policy(policy), float(strength)))
        for policy in policies
        for strength in strengths
    ]
    if not found:
        raise ValueError("`policies` and `strengths` must not be empty.")
    return found


def _backups(plan: Plan) -> list[Backup]:
    return [backup for _, backup in plan]


def _reasons(task: CertifiedTask, guards: Sequence[CertifiedTask], p: float, alpha: float) -> list[str]:
    """Why an edit is not kept; empty where it is."""
    reasons = []
    if task.upper < 0:
        reasons.append(f"{task.name} becomes worse: {task.difference:+.4f}, upper bound {task.upper:+.4f}")
    elif task.lower <= 0:
        reasons.append(
            f"{task.name}: a gain of {task.difference:+.4f} with a lower bound of {task.lower:+.4f}, not above 0"
        )
    if p > alpha:
        reasons.append(f"random components do as well: p = {p:.3g} among the controls, above {alpha:g}")
    for guard in guards:
        if guard.verdict != "PASS":
            bounds = f"{guard.difference:+.4f} [{guard.lower:+.4f}, {guard.upper:+.4f}]"
            reasons.append(f"guard {guard.name} is {guard.verdict} at margin {guard.margin:g}: {bounds}")
    return reasons


def _verdict(task: CertifiedTask, guards: Sequence[CertifiedTask], refused: bool) -> Verdict:
    if not refused:
        return "PASS"
    return "FAIL" if task.upper < 0 or any(guard.verdict == "FAIL" for guard in guards) else "INCONCLUSIVE"
