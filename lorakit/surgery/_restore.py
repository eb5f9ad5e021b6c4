"""Restoring what fine-tuning forgot: intruder directions of the tuned weights are shrunk in the adapter's update.

An intruder direction u is a leading left singular vector of W + ΔW that resembles none of W. With Q an orthonormal
basis of a module's intruders, ΔW − (1 − s) Q Qᵀ ΔW scales what the update writes along them by s: only B changes, to
B − (1 − s) Q (Qᵀ B), so that rank, names and A stay.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit._checks import check_integer, check_number
from lorakit._version import __version__
from lorakit.adapters import open_adapter
from lorakit.adapters.base_weights import open_module_weights
from lorakit.adapters.in_model import LiveModule
from lorakit.calibration.state import preserved_rng
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.evaluation import CertifiedTask, Scores, Task, loss
from lorakit.evaluation._certified_task import evidence_of
from lorakit.evaluation._models import label_of
from lorakit.spectral import LowRank
from lorakit.spectral._intruders import intruder_vectors
from lorakit.statistics import control_p_value
from lorakit.surgery._edit import Backup, exchange, factors_of
from lorakit.surgery._restore_report import FrontierPoint, RestoreControl, RestoredRow, RestoreEdit, RestoreReport
from lorakit.surgery._scoring import Scoring, bar_of
from lorakit.surgery._select import check_layers, select_modules

SCALES = (0.75, 0.5, 0.25, 0.0)
_RULE = (
    "scales are tested from mild to strong for as long as the task and every guard are non-inferior at their margins; "
    "of those, the one with the largest lower bound of the gain on base text is kept, if that bound, at alpha divided "
    "by the number of scales, is above 0, and if p = (1 + #{control ≥ it}) / (controls + 1) is at most alpha; a "
    "control shrinks as many other components of each module's update, and its largest bound at these scales counts"
)


@dataclass(frozen=True)
class _Shrinkable:
    """A module and an orthonormal basis Q (d_out, n) of the directions in its outputs that are shrunk."""

    module: LiveModule
    Q: Tensor


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """What is shrunk, how far, and the texts and controls by which it is judged."""

    base_text: Any
    scales: Sequence[float]
    target_modules: str | Sequence[str] | None
    top_k: int
    intruder_below: float
    controls: int
    seed: int

    def __post_init__(self) -> None:
        """Raises: TypeError, ValueError."""
        if self.base_text is None:
            raise ValueError('`base_text` is needed with objective="restore": texts on which the base model is good.')
        if not self.ladder or not 0 <= self.ladder[-1] <= self.ladder[0] < 1:
            raise ValueError(f"`scales` must be in [0, 1); got {tuple(self.scales)}.")
        check_integer("top_k", self.top_k)
        check_number("intruder_below", self.intruder_below, above=0, most=1)

    @property
    def ladder(self) -> list[float]:
        """The scales from mild to strong."""
        return sorted({float(scale) for scale in self.scales}, reverse=True)


def restore(scoring: Scoring, settings: RestoreSettings, *, progress: bool) -> RestoreReport:
    """Shrink intruder directions as far as the task allows; see ``lorakit.surgery.refine(objective="restore")``."""
    given = settings.base_text
    text: Task = given if hasattr(given, "fingerprint") else loss(given, name="base text")
    if text.name in scoring.question.margins:
        raise EvaluationError(f"`base_text` must have a name of its own; got {text.name!r}.")
    modules = _intruded(scoring.adapter, scoring.adapter_name, settings)
    frontier = _Frontier(scoring, modules, text, settings)
    if not modules:
        return frontier.report("the tuned weights have no intruder direction in the selected modules")
    with preserved_rng(scoring.adapter):
        return frontier.decided(progress=progress)


class _Frontier:
    """Task and base text at every scale, the controls, and which scale is kept."""

    def __init__(self, scoring: Scoring, modules: Sequence[_Shrinkable], text: Task, settings: RestoreSettings) -> None:
        self.scoring, self.modules, self.text, self.settings = scoring, modules, text, settings
        self.estimate = 0.0
        self.points: list[FrontierPoint] = []
        self.controls: list[RestoreControl] = []

    def decided(self, *, progress: bool) -> RestoreReport:
        """The report, with the adapter at the scale that is kept, if one is."""
        ladder, count = self.settings.ladder, self.settings.controls
        tasks = [*self.scoring.question.wanted, self.text]
        before = self.scoring(tasks)
        _check_disjoint(before, self.text.name)
        of_text = self.scoring.seconds[self.text.name]
        self.estimate = len(ladder) * (self.scoring.spent + count * of_text)
        with bar_of(len(ladder) * (1 + count), self.estimate, progress=progress) as bar:
            for scale in ladder:
                after = self.scoring(tasks, shrunk(self.modules, scale))
                *own, text = (self._result(task, before, after) for task in tasks)
                self.points.append(FrontierPoint(scale, tuple(own), text))
                bar.update()
            allowed = list(
                itertools.takewhile(lambda point: all(t.verdict == "PASS" for t in point.tasks), self.points)
            )
            if not allowed:
                return self.report(f"the task or a guard does not pass even at scale {ladder[0]:g}")
            best = max(allowed, key=lambda point: point.base_text.lower)
            lower = best.base_text.lower
            if lower <= 0:
                reason = "no allowed scale has a gain on base text with a lower bound above 0"
                return self.report(f"{reason}; the best is {lower:+.4g}")
            generator = torch.Generator().manual_seed(self.settings.seed)
            for _ in range(count):
                self.controls.append(self._control([point.scale for point in allowed], before, generator, bar))
        p = control_p_value(lower, [control.lower for control in self.controls])
        alpha = self.scoring.question.alpha
        if p > alpha:
            return self.report(f"other components do as well: p = {p:.3g} among the controls, above {alpha:g}", p=p)
        found = self.report(None, p=p, kept=best)
        exchange(shrunk(self.modules, best.scale))
        return found

    def _control(
        self, scales: Sequence[float], before: dict[str, Scores], generator: torch.Generator, bar: Any
    ) -> RestoreControl:
        """Other components, drawn at random, shrunk by each scale: what base text gains at the best."""
        drawn = [other_directions(one.module, one.Q, generator) for one in self.modules]
        modules = [_Shrinkable(one.module, Q) for one, Q in zip(self.modules, drawn, strict=True)]
        share = share_along(modules)
        found = []
        for scale in scales:
            result = self._result(self.text, before, self.scoring([self.text], shrunk(modules, scale)))
            found.append(RestoreControl(scale, result.difference, result.lower, share))
            bar.update()
        return max(found, key=lambda one: one.lower)

    def _result(self, task: Task, before: dict[str, Scores], after: dict[str, Scores]) -> CertifiedTask:
        question = self.scoring.question
        of_text = task is self.text
        level = question.alpha / len(self.settings.ladder) if of_text else question.alpha
        margin = question.margin if of_text else question.margins[task.name]
        pair = ([before[task.name]], [after[task.name]])
        guard = task.name in question.guarded
        groups = (question.groups or {}).get(task.name)
        evidence = evidence_of(*pair, name=task.name, margin=margin, alpha=level, groups=groups, guard=guard)
        return evidence.certified(level, None)

    def report(self, reason: str | None, *, p: float | None = None, kept: FrontierPoint | None = None) -> RestoreReport:
        adapter, name = self.scoring.adapter, self.scoring.adapter_name
        failed = bool(self.points) and any(one.verdict == "FAIL" for one in self.points[0].tasks)
        edit = None if kept is None else _edit(self.scoring, self.modules, kept.scale)
        return RestoreReport(
            model_name=label_of(adapter),
            adapter_name=name,
            kept=edit is not None,
            verdict="PASS" if edit else "FAIL" if failed else "INCONCLUSIVE",
            reasons=() if reason is None else (reason,),
            rule=_RULE,
            scale=None if kept is None else kept.scale,
            alpha=self.scoring.question.alpha,
            intruders={one.module.name: one.Q.shape[1] for one in self.modules},
            intruder_share=share_along(self.modules) if self.modules else None,
            frontier=tuple(self.points),
            controls=tuple(self.controls),
            p_value=p,
            seed=self.settings.seed,
            estimated_seconds=self.estimate,
            seconds=self.scoring.spent,
            edit=edit,
        )


def _intruded(model: Any, adapter_name: str, settings: RestoreSettings) -> list[_Shrinkable]:
    """The selected modules that have intruder directions, in the outputs of W + ΔW."""
    selected = select_modules(model, adapter_name, settings.target_modules)
    check_layers(model, adapter_name, selected)
    weights = open_module_weights(model, open_adapter(model, adapter_name=adapter_name).modules, dequantize=True)
    found = []
    for module in selected:
        if module.name not in weights.read:
            raise SurgeryError(f"The base weight of {module.name!r} cannot be read.")
        W = weights.read[module.name]().float()
        update = module.factors().dense().to(W)
        options: dict[str, Any] = {"top_k": settings.top_k, "below": settings.intruder_below}
        Q = intruder_vectors(W, W + update, **options) if bool(update.any()) else W[:, :0]
        if Q.shape[1]:
            found.append(_Shrinkable(module, Q))
    return found


def shrunk(modules: Sequence[_Shrinkable], scale: float) -> list[Backup]:
    """The factors before and after each module's update is multiplied by `scale` along its directions."""
    backups = []
    for one in modules:
        B, A = before = factors_of(one.module)
        wide, Q = B.double(), one.Q.to(B.device).double()
        backups.append(Backup(one.module, before, ((wide - (1 - scale) * Q @ (Q.mT @ wide)).to(B.dtype), A)))
    return backups


def other_directions(module: LiveModule, Q: Tensor, generator: torch.Generator) -> Tensor:
    """As many output directions (d_out, n) of a module's update as Q (d_out, n) has, drawn at random.

    They are left singular vectors of ΔW, other than the n that lie most along Q where at least n others remain: with
    more intruders than that, of all. An update of rank below n has only its rank's worth.
    """
    U, S, _ = module.factors().svd()
    U = U[:, S > 0]
    n, m = Q.shape[1], U.shape[1]
    along = torch.argsort((Q.to(U).mT @ U).square().sum(0), stable=True)
    pool = along[: m - n] if m >= 2 * n else along
    return U[:, pool[torch.randperm(len(pool), generator=generator)[:n].to(pool.device)]]


def share_along(modules: Sequence[_Shrinkable]) -> float:
    """How much of the modules' updates lies along their directions, in squared Frobenius norm."""
    along, total = 0.0, 0.0
    for one in modules:
        update = one.module.factors()
        total += float(update.frobenius_norm()) ** 2
        part = LowRank(one.Q.to(update.B).mT @ update.B, update.A, update.scaling)
        along += float(part.frobenius_norm()) ** 2
    return along / total


def _check_disjoint(scores: dict[str, Scores], text: str) -> None:
    for name, one in scores.items():
        both = set(one.documents) & set(scores[text].documents) if name != text else set()
        if both:
            raise EvaluationError(f"{len(both)} documents of {name!r} are in `base_text` too; they must be different.")


def _edit(scoring: Scoring, modules: Sequence[_Shrinkable], scale: float) -> RestoreEdit:
    backups = shrunk(modules, scale)
    rows = []
    for one, backup in zip(modules, backups, strict=True):
        U, sigma, _ = one.module.factors().svd()
        edited = LowRank(*backup.after, one.module.scaling).singular_values()
        carried = (one.Q.to(U).mT @ U).square().sum(0)
        rows.append(
            RestoredRow(
                module_name=one.module.name,
                role=one.module.role,
                rank=one.module.rank,
                scaling=one.module.scaling,
                num_intruders=one.Q.shape[1],
                singular_values=sigma.double().tolist(),
                gate=(1 - (1 - scale) * carried.double()).tolist(),
                edited_singular_values=edited.double().tolist(),
            )
        )
    return RestoreEdit(
        model_name=label_of(scoring.adapter),
        adapter_name=scoring.adapter_name,
        modules=rows,
        edit_id=uuid.uuid4().hex,
        policy="restore",
        policy_parameters={"scale": scale},
        lorakit_version=__version__,
        _backups=backups,
        _model=scoring.adapter,
        _source=scoring.source,
    )
