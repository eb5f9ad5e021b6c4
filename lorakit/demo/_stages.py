"""What the demo does to the trained adapters: audit, compress, operate, export, certify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorakit import compress, evaluation, export, surgery
from lorakit._format import size
from lorakit.compress import CompressReport
from lorakit.data import loader
from lorakit.demo._data import DemoData
from lorakit.demo._settings import DemoError, DemoSettings
from lorakit.demo._training import FISHERLORA, LORA, OTHER_SEED, SPECLORA, Trained
from lorakit.evaluation import Certificate
from lorakit.evaluation.comparison import Comparison, Question
from lorakit.lens import AuditReport, audit
from lorakit.statistics import Interval
from lorakit.surgery import SurgeryReport

COMPRESSED, SURGERY, RANDOM = "LoRA, compressed", "LoRA+surgery", "LoRA+random"
DIRECTORIES = {  # in the order of the table
    LORA: "lora",
    OTHER_SEED: "lora-other-seed",
    COMPRESSED: "lora-compressed",
    SURGERY: "lora-surgery",
    RANDOM: "lora-random",
    FISHERLORA: "fisherlora-as-lora",
    SPECLORA: "speclora-as-lora",
}
POLICIES = {SURGERY: "smooth_abs", RANDOM: "random_index"}


@dataclass(frozen=True)
class Context:
    """What every stage needs. Files are written into `work`, which takes the place of `out` in the end."""

    settings: DemoSettings
    say: Callable[[str], None]
    work: Path
    data: DemoData
    tokenizer: Any

    def path(self, method: str) -> Path:
        """Where a method's adapter is written."""
        return self.work / DIRECTORIES[method]

    def name(self, method: str) -> str:
        """What reports call it: the path where it will lie."""
        return str(Path(self.settings.out) / DIRECTORIES[method])

    def tell(self, stage: str, text: str) -> None:
        """One line about a stage."""
        self.say(f"{stage:<9} {text}")


@dataclass(frozen=True)
class Written:
    """An adapter's file, as a plain LoRA of a rank, and the logits that the model gave before it was written."""

    method: str
    parameters: int
    rank: int
    logits: Tensor | None
    trained: Trained | None = None


@dataclass(frozen=True)
class Verdicts:
    """The certificates of all files against the LoRA's, by method; the model without an adapter has an interval."""

    loss: float
    certificates: dict[str, Certificate]
    errors: dict[str, float]
    no_adapter_loss: float
    no_adapter: Interval


def audit_and_compress(context: Context) -> tuple[AuditReport, CompressReport, Written]:
    """Audit the LoRA's file, and cut it to the ranks that the audit recommends."""
    found = audit(context.path(LORA), suggest_ranks=True)
    found = replace(found, path=context.name(LORA))
    context.tell("audit", found.headline)
    recommended = found.recommended
    if recommended is None:
        raise DemoError("The trained LoRA's updates are all zero, so that no rank can be recommended.")
    made = compress.truncate(context.path(LORA), context.path(COMPRESSED), ranks=recommended.ranks)
    made = replace(made, source=context.name(LORA), path=context.name(COMPRESSED))
    sizes = f"{size(made.size_bytes_before)} → {size(made.size_bytes)}"
    context.tell("compress", f"rank {made.rank_before} → {made.r}, {sizes}, {made.energy_kept:.1%} of the energy kept")
    return found, made, Written(COMPRESSED, made.parameters, made.r, None)


def operate(model: PeftModel, trained: Trained, context: Context) -> tuple[SurgeryReport, list[Written]]:
    """The LoRA after surgery and after its random control, each saved and undone again."""
    settings, written = context.settings, []
    edits: dict[str, SurgeryReport] = {}
    for method, policy in POLICIES.items():
        documents = loader(
            context.data.calibration, context.tokenizer, length=settings.document_length, batch_size=1, progress=False
        )
        edit = surgery.reweight(
            model, documents, policy=policy, num_examples=settings.calibration_documents, seed=settings.seed
        )
        context.tell(
            "surgery", f"{policy}: {len(edit.modules)} modules, {edit.num_examples} documents, {edit.details[0]}"
        )
        edit.save(context.path(method))
        written.append(Written(method, trained.parameters, settings.r, probe(model, context)))
        edit.undo()
        edits[method] = edit
    return edits[SURGERY], written


def save(model: PeftModel, trained: Trained, context: Context) -> Written:
    """Write a trained adapter: a LoRA as PEFT saves it, the others as plain LoRAs."""
    out, method = context.path(trained.method), trained.method
    logits = probe(model, context)
    if method in (LORA, OTHER_SEED):
        model.save_pretrained(str(out))
        return Written(method, trained.parameters, context.settings.r, logits, trained)
    report = export.to_lora(model, out)
    context.tell("export", f"{method} as a plain LoRA of rank {report.r}")
    return Written(method, trained.parameters, report.r, logits, trained)


@torch.no_grad()
def probe(model: Any, context: Context) -> Tensor:
    """The logits of the first training passage."""
    logits: Tensor = model(input_ids=context.data.train[0][:1].to(model.device), use_cache=False).logits
    return logits.float()


def certify(base: nn.Module, files: Sequence[Written], context: Context) -> Verdicts:
    """Score every file on the held-out documents, and certify each against the first, which is the LoRA's.

    Raises: EvaluationError for held-out documents that were trained or calibrated on, and as `evaluation.certify`.
    """
    settings = context.settings
    task = evaluation.loss(context.data.held_out, length=settings.document_length, batch_size=1)
    question = Question(
        tasks=task,
        margin=settings.margin,
        alpha=settings.alpha,
        tokenizer=context.tokenizer,
        used_documents=context.data.used_documents,
        progress=False,
    )
    comparison = Comparison(base, question)
    certificates: dict[str, Certificate] = {}
    errors: dict[str, float] = {}
    reference, *candidates = files
    lora = comparison.score([context.path(reference.method)], names=[context.name(reference.method)])
    for one in tqdm(candidates, desc="certifying", unit="adapter", leave=False):
        side = comparison.score([context.path(one.method)], names=[context.name(one.method)])
        found = comparison.certificate([lora], side)
        found.save(context.work / "certificates" / f"{DIRECTORIES[one.method]}.json")
        certificates[one.method] = found
    for one in files:
        if one.logits is not None:
            with comparison.attached(context.path(one.method)) as model:
                after = probe(model, context)
            errors[one.method] = float((after - one.logits).abs().max() / one.logits.abs().max())
    scores = lora.scores[0][task.name]
    plain = evaluation.evaluate(base, task, tokenizer=context.tokenizer, progress=False)[task.name]
    return Verdicts(
        loss=-scores.mean,
        certificates=certificates,
        errors=errors,
        no_adapter_loss=-plain.mean,
        no_adapter=evaluation.compare(scores, plain, alpha=settings.alpha),
    )
