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
from lorakit.evaluation.comparison import Question
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


def restore(
    adapter: PeftModel,
    adapter_name: str,
    question: Question,
    tokenizer: Any,
    *,
    base_text: Any,
    scales: Sequence[float],
    target_modules: str | Sequence[str] | None,
    top_k: int,
    intruder_below: float,
    progress: bool,
) -> RestoreReport:
    """Shrink intruder directions as far as the task allows; see ``lorakit.surgery.refine(objective="restore")``."""
    if base_text is None:
        raise ValueError('`base_text` is needed with objective="restore": texts on which the base model is good.')
    ladder = sorted({float(scale) for scale in scales}, reverse=True)
    if not ladder or not 0 <= ladder[-1] <= ladder[0] < 1:
        raise ValueError(f"`scales` must be in [0, 1); got {tuple(scales)}.")
    check_integer("top_k", top_k)
    check_number("intruder_below", intruder_below, above=0, most=1)
    text: Task = base_text if hasattr(base_text, "fingerprint") else loss(base_text, name="base text")
    if text.name in question.margins:
        raise EvaluationError(f"`base_text` must have a name of its own; got {text.name!r}.")
    modules = _intruded(adapter, adapter_name, target_modules, top_k, intruder_below)
    scoring = Scoring(adapter, adapter_name, question, tokenizer)
    tasks, alpha = [*question.wanted, text], question.alpha

    def result(task: Task, before: dict[str, Scores], after: dict[str, Scores]) -> CertifiedTask:
        of_text = task is text
        level = alpha / len(ladder) if of_text else alpha
        margin = question.margin if of_text else question.margins[task.name]
        pair = ([before[task.name]], [after[task.name]])
        guard = task.name in question.guarded
        return evidence_of(*pair, name=task.name, margin=margin, alpha=level, guard=guard).certified(level, None)

    def report(points: Sequence[FrontierPoint], reason: str | None, kept: int | None, estimate: float) -> RestoreReport:
        failed = bool(points) and any(one.verdict == "FAIL" for one in points[0].tasks)
        edit = None if kept is None else _report(adapter, adapter_name, modules, points[kept].scale)
        return RestoreReport(
            model_name=_model_name(adapter),
            adapter_name=adapter_name,
            kept=edit is not None,
            verdict="PASS" if edit else "FAIL" if failed else "INCONCLUSIVE",
            reasons=() if reason is None else (reason,),
            rule=_RULE,
            scale=None if kept is None else points[kept].scale,
            alpha=alpha,
            intruders={one.module.name: one.Q.shape[1] for one in modules},
            frontier=tuple(points),
            estimated_seconds=estimate,
            seconds=scoring.spent,
            edit=edit,
        )

    if not modules:
        return report((), "the tuned weights have no intruder direction in the selected modules", None, 0.0)
    points: list[FrontierPoint] = []
    with preserved_rng(adapter):
        before = scoring(tasks)
        _check_disjoint(before, text.name)
        estimate = len(ladder) * scoring.spent
        with bar_of(len(ladder), estimate, progress=progress) as bar:
            for scale in ladder:
                after = scoring(tasks, shrunk(modules, scale))
                own = tuple(result(task, before, after) for task in question.wanted)
                points.append(FrontierPoint(scale, own, result(text, before, after)))
                bar.update()
    allowed = next((i for i, p in enumerate(points) if any(t.verdict != "PASS" for t in p.tasks)), len(points))
    best = max(range(allowed), key=lambda i: points[i].base_text.lower, default=None)
    if best is None:
        return report(points, f"the task or a guard does not pass even at scale {points[0].scale:g}", None, estimate)
    lower = points[best].base_text.lower
    if lower <= 0:
        reason = f"no allowed scale has a gain on base text with a lower bound above 0; the best is {lower:+.4g}"
        return report(points, reason, None, estimate)
    found = report(points, None, best, estimate)
    exchange(shrunk(modules, points[best].scale))
    return found


def _intruded(
    model: Any, adapter_name: str, target_modules: str | Sequence[str] | None, top_k: int, below: float
) -> list[_Intruded]:
    """The selected modules that have intruder directions, in the outputs of W + ΔW."""
    selected = select_modules(model, adapter_name, target_modules)
    check_layers(model, adapter_name, selected)
    weights = open_module_weights(model, open_adapter(model, adapter_name=adapter_name).modules, dequantize=True)
    found = []
    for module in selected:
        if module.name not in weights.read:
            raise SurgeryError(f"The base weight of {module.name!r} cannot be read.")
        W = weights.read[module.name]().float()
        update = module.factors().dense().to(W)
        Q = intruder_vectors(W, W + update, top_k=top_k, below=below) if bool(update.any()) else W[:, :0]
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
