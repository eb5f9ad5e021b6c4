"""Restoring what fine-tuning forgot: intruder directions of the tuned weights are shrunk in the adapter's update.

An intruder direction u is a leading left singular vector of W + ΔW that resembles none of W. With Q an orthonormal
basis of a module's intruders, ΔW − (1 − s) Q Qᵀ ΔW scales what the update writes along them by s: only B changes, to
B − (1 − s) Q (Qᵀ B), so that rank, names and A stay.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lorakit._checks import check_integer, check_number
from lorakit._version import __version__
from lorakit.adapters import open_adapter
from lorakit.adapters.base_weights import open_module_weights
from lorakit.adapters.in_model import LiveModule
from lorakit.calibration.state import base_model_of, preserved_rng
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.evaluation import CertifiedTask, Scores, Task, loss
from lorakit.evaluation._certified_task import evidence_of
from lorakit.spectral._intruders import intruder_vectors
from lorakit.surgery._edit import Backup, SurgeryReport, exchange, factors_of
from lorakit.surgery._report import EditedRow
from lorakit.surgery._restore_report import FrontierPoint, RestoreReport
from lorakit.surgery._scoring import Scoring, bar_of
from lorakit.surgery._select import check_layers, select_modules

SCALES = (0.75, 0.5, 0.25, 0.0)
_RULE = (
    "scales are tested from mild to strong for as long as the task and every guard are non-inferior at their margins; "
    "of those, the one with the largest lower bound of the gain on base text is kept, if that bound, at alpha divided "
    "by the number of scales, is above 0"
)


@dataclass(frozen=True)
class _Intruded:
    """A module and an orthonormal basis Q (d_out, n) of its intruder directions."""

    module: LiveModule
    Q: Tensor


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """What is shrunk, how far, and the texts by which it is judged."""

    base_text: Any
    scales: Sequence[float]
    target_modules: str | Sequence[str] | None
    top_k: int
    intruder_below: float

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
    frontier = _Frontier(scoring, modules, text, settings.ladder)
    if not modules:
        return frontier.report((), "the tuned weights have no intruder direction in the selected modules", None)
    with preserved_rng(scoring.adapter):
        points = frontier.points(progress=progress)
    return frontier.decided(points)


class _Frontier:
    """Task and base text at every scale, and which of them is kept."""

    def __init__(self, scoring: Scoring, modules: Sequence[_Intruded], text: Task, ladder: Sequence[float]) -> None:
        self.scoring, self.modules, self.text, self.ladder = scoring, modules, text, ladder
        self.estimate = 0.0

    def points(self, *, progress: bool) -> list[FrontierPoint]:
        tasks = [*self.scoring.question.wanted, self.text]
        before = self.scoring(tasks)
        _check_disjoint(before, self.text.name)
        self.estimate = len(self.ladder) * self.scoring.spent
        found = []
        with bar_of(len(self.ladder), self.estimate, progress=progress) as bar:
            for scale in self.ladder:
                after = self.scoring(tasks, shrunk(self.modules, scale))
                *own, text = (self._result(task, before, after) for task in tasks)
                found.append(FrontierPoint(scale, tuple(own), text))
                bar.update()
        return found

    def _result(self, task: Task, before: dict[str, Scores], after: dict[str, Scores]) -> CertifiedTask:
        question = self.scoring.question
        of_text = task is self.text
        level = question.alpha / len(self.ladder) if of_text else question.alpha
        margin = question.margin if of_text else question.margins[task.name]
        pair = ([before[task.name]], [after[task.name]])
        guard = task.name in question.guarded
        return evidence_of(*pair, name=task.name, margin=margin, alpha=level, guard=guard).certified(level, None)

    def decided(self, points: Sequence[FrontierPoint]) -> RestoreReport:
        """The report, with the adapter at the scale that is kept, if one is."""
        allowed = next((i for i, p in enumerate(points) if any(t.verdict != "PASS" for t in p.tasks)), len(points))
        best = max(range(allowed), key=lambda i: points[i].base_text.lower, default=None)
        if best is None:
            return self.report(points, f"the task or a guard does not pass even at scale {points[0].scale:g}", None)
        lower = points[best].base_text.lower
        if lower <= 0:
            reason = f"no allowed scale has a gain on base text with a lower bound above 0; the best is {lower:+.4g}"
            return self.report(points, reason, None)
        found = self.report(points, None, best)
        exchange(shrunk(self.modules, points[best].scale))
        return found

    def report(self, points: Sequence[FrontierPoint], reason: str | None, kept: int | None) -> RestoreReport:
        adapter, name = self.scoring.adapter, self.scoring.adapter_name
        failed = bool(points) and any(one.verdict == "FAIL" for one in points[0].tasks)
        edit = None if kept is None else _report(adapter, name, self.modules, points[kept].scale)
        return RestoreReport(
            model_name=_model_name(adapter),
            adapter_name=name,
            kept=edit is not None,
            verdict="PASS" if edit else "FAIL" if failed else "INCONCLUSIVE",
            reasons=() if reason is None else (reason,),
            rule=_RULE,
            scale=None if kept is None else points[kept].scale,
            alpha=self.scoring.question.alpha,
            intruders={one.module.name: one.Q.shape[1] for one in self.modules},
            frontier=tuple(points),
            estimated_seconds=self.estimate,
            seconds=self.scoring.spent,
            edit=edit,
        )


def _intruded(model: Any, adapter_name: str, settings: RestoreSettings) -> list[_Intruded]:
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
            found.append(_Intruded(module, Q))
    return found


def shrunk(modules: Sequence[_Intruded], scale: float) -> list[Backup]:
    backups = []
    for one in modules:
        B, A = before = factors_of(one.module)
        wide, Q = B.double(), one.Q.to(B.device).double()
        backups.append(Backup(one.module, before, ((wide - (1 - scale) * Q @ (Q.mT @ wide)).to(B.dtype), A)))
    return backups


def _check_disjoint(scores: dict[str, Scores], text: str) -> None:
    for name, one in scores.items():
        both = set(one.documents) & set(scores[text].documents) if name != text else set()
        if both:
            raise EvaluationError(f"{len(both)} documents of {name!r} are in `base_text` too; they must be different.")


def _model_name(model: PeftModel) -> str:
    base = base_model_of(model)
    return getattr(base, "name_or_path", "") or type(base).__name__


def _report(model: PeftModel, adapter_name: str, modules: Sequence[_Intruded], scale: float) -> SurgeryReport:
    backups = shrunk(modules, scale)
    rows = []
    for one, backup in zip(modules, backups, strict=True):
        sigma = one.module.factors().svd()[1].detach().double().cpu()
        B, A = (factor.double() for factor in backup.after)
        edited = torch.linalg.svdvals(B @ A)[: sigma.shape[0]].cpu() * one.module.scaling
        rows.append(
            EditedRow(
                module_name=one.module.name,
                role=one.module.role,
                rank=one.module.rank,
                scaling=one.module.scaling,
                singular_values=sigma.tolist(),
                sensitivity=[0.0] * sigma.shape[0],
                per_example=torch.zeros(0, sigma.shape[0]),
                gate=torch.where(sigma > 0, edited / torch.where(sigma > 0, sigma, 1), 1).tolist(),
                energy_scale=1.0,
                edited_singular_values=edited.tolist(),
            )
        )
    return SurgeryReport(
        model_name=_model_name(model),
        adapter_name=adapter_name,
        aggregate="none",
        num_examples=0,
        num_without_labels=0,
        zero_modules=[],
        idle_modules=[],
        modules=rows,
        edit_id=uuid.uuid4().hex,
        policy="restore",
        policy_parameters={"scale": scale, "intruders": {one.module.name: one.Q.shape[1] for one in modules}},
        preserve_energy="none",
        seed=0,
        lorakit_version=__version__,
        _backups=backups,
        _model=model,
    )
