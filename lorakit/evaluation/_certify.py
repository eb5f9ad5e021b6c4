"""Reference against candidate: a verdict at a margin that is fixed before the first score is computed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit._report import Report
from lorakit.errors import EvaluationError
from lorakit.evaluation._attach import adapted
from lorakit.evaluation._digests import adapter_digest, base_digest, digest
from lorakit.evaluation._evaluate import scored, seeds_of, tasks_of
from lorakit.evaluation._models import LoadOptions, label_of, load_base, load_tokenizer
from lorakit.evaluation._scores import Scores
from lorakit.evaluation.comparison import Comparison, Question, Side

PLAN_DOCUMENTS = 50


@dataclass(frozen=True, repr=False)
class CertificationPlan(Report):
    """What a verdict will take: for each task, documents and minutes, from `PLAN_DOCUMENTS` documents scored.

    `documents_needed` is for a candidate as good as the reference, with a probability of 0.8 to PASS.
    """

    margin: float
    alpha: float
    minutes: float
    tasks: tuple[dict[str, Any], ...]

    @property
    def headline(self) -> str:
        """What it will take, in a line."""
        needs = ", ".join(
            f"more seeds of {row['name']}"
            if row["documents_needed"] is None
            else f"{row['documents_needed']} documents of {row['name']}"
            for row in self.tasks
        )
        return f"A verdict at margin {self.margin:g} needs about {needs}: {self.minutes:.1f} minutes."

    def rows(self) -> list[dict[str, Any]]:
        """One row a task."""
        return [dict(row) for row in self.tasks]


def certify(
    base: Any,
    reference: Any,
    candidate: Any,
    *,
    tasks: Any,
    margin: float,
    alpha: float = 0.05,
    guards: Any = (),
    groups: Mapping[str, Sequence[Any]] | None = None,
    policy_tolerance: float | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    plan: bool = False,
    used_documents: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    progress: bool = True,
) -> Any:
    """Whether the candidate is as good as the reference on every task, within a margin.

    Args:
        base: the base model: a path, a Hub id or a model.
        reference, candidate: an adapter each (a path, a Hub id or a PeftModel), or a list of at least three seeds of
            it, paired by their place.
        tasks: a task or several; see `lorakit.evaluation.choices` and the functions beside it. Paths and names too.
        margin: how much worse the candidate may be, in the units of the scores; a task's own margin wins.
        alpha: the level of each one-sided bound.
        guards: more tasks on which the candidate must not be worse, at their own margins or `margin`.
        groups: by a task's name, which passage each of its documents belongs to.
        policy_tolerance: for seeds: report besides whether the worst seed's mean difference is at least this much below
            0 (Gradience's policy is 0.025, 2.5 points). It is no part of the verdict.
        tokenizer: None: from beside the reference, else the base model's.
        limit: how many documents of each task at most.
        plan: score 50 documents and say what a verdict at this margin will take; a `CertificationPlan`.
        used_documents: hashes of documents that calibration or selection has used; a task that has one is refused.
        cache: a directory for results, so that a reference is evaluated once.
        options: how the base model is loaded.
        progress: show progress bars on stderr.
    Returns: a `Certificate`, or with `plan` a `CertificationPlan`.
    Raises: EvaluationError for adapters that do not fit or are not applied, different prompts or dtypes of the two
        sides, documents that are missing, there twice or used before, and scores that are not finite.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size))
        >>> adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        >>> ids = torch.arange(32).view(8, 4)
        >>> batches = [{"input_ids": ids, "labels": ids}]
        >>> from lorakit.evaluation import loss
        >>> certificate = certify(base, adapter, adapter, tasks=loss(batches), margin=0.05, progress=False)
        >>> certificate.verdict, certificate.difference
        ('PASS', 0.0)
    """
    sides = [seeds_of(reference), seeds_of(candidate)]
    if len(sides[0]) != len(sides[1]) or len(sides[0]) == 2:
        raise EvaluationError(
            f"Give one adapter a side, or at least three seeds of each; got {len(sides[0])} and {len(sides[1])}."
        )
    if policy_tolerance is not None and len(sides[0]) == 1:
        raise EvaluationError("`policy_tolerance` is for seeds: give at least three adapters a side.")
    question = Question(
        tasks=tasks,
        margin=margin,
        alpha=alpha,
        guards=guards,
        groups=groups,
        policy_tolerance=policy_tolerance,
        tokenizer=tokenizer,
        limit=PLAN_DOCUMENTS if plan else limit,
        used_documents=used_documents,
        cache=cache,
        options=options,
        progress=progress,
    )
    comparison = Comparison(base, question, reference=sides[0][0])
    started = time.perf_counter()
    scored_sides = [comparison.score(side) for side in sides]
    if plan:
        return _plan(comparison, scored_sides, time.perf_counter() - started)
    return comparison.certificate(scored_sides[:1], scored_sides[1])


def evaluate_adapters(
    base: Any,
    adapters: Sequence[Any],
    tasks: Any,
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Scores]]:
    """The scores of several adapters of one base model, by adapter and task; arguments and errors as in `certify`."""
    wanted = tasks_of(tasks)
    model = load_base(base, options)
    weights = "" if cache is None else base_digest(model)
    found = {}
    for adapter in adapters:
        own = load_tokenizer(base, adapter, options) if tokenizer is None else tokenizer
        depends = "" if cache is None else digest([weights, adapter_digest(adapter)])
        with adapted(model, adapter) as with_adapter:
            one = scored(with_adapter, wanted, own, limit=limit, cache=cache, weights=depends, progress=progress)
        found[label_of(adapter)] = {name: replace(scores, model=label_of(adapter)) for name, scores in one.items()}
    return found


def _plan(comparison: Comparison, sides: Sequence[Side], seconds: float) -> CertificationPlan:
    question = comparison.question
    results = comparison.results(sides[:1], sides[1])
    scored_documents = sum(row.n for row in results)
    rows: list[dict[str, Any]] = [
        {
            "name": row.name,
            "margin": row.margin,
            "documents_scored": row.n,
            "documents_needed": row.documents_needed,
            "minutes": None if row.documents_needed is None else seconds / 60 * row.documents_needed / scored_documents,
        }
        for row in results
    ]
    minutes = sum(row["minutes"] or 0.0 for row in rows)
    return CertificationPlan(question.margin, question.alpha, minutes, tuple(rows))
