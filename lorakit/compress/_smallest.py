"""The smallest adapter whose task survives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.adapters import open_adapter
from lorakit.adapters.companions import check_overwrite
from lorakit.compress._heal import HealSettings, prepare
from lorakit.compress._truncate import truncate
from lorakit.compress.ladder import LADDER, Rung, SmallestReport, descend
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions
from lorakit.evaluation.comparison import Comparison, Question


def smallest(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: Any,
    tasks: Any,
    margin: float,
    alpha: float = 0.05,
    guards: Any = (),
    groups: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    used_documents: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    heal_steps: int = 0,
    heal_text: Any = None,
    heal_learning_rate: float = 1e-4,
    heal_length: int = 256,
    heal_seed: int = 0,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> SmallestReport:
    """Write the adapter at the smallest rank at which it is as good as it was on every task, within a margin.

    The ranks 512, 256, 128, …, 2 and 1 that lie below the adapter's are tested from large to small on the same
    documents, each at `alpha`, until one does not PASS: the probability that what is written is worse than the margin
    is then at most `alpha` (fixed-sequence testing). Each is `truncate(adapter, …, max_rank=rank)`. The certificate is
    written with the adapter, beside it and into its model card, in one step. Where the largest rank does not PASS,
    nothing is written.

    With `heal_steps`, each cut adapter is healed before it is judged: its factors are trained for that many steps of 8
    texts to predict what `adapter` predicts (the KL divergence to it, on every token, by AdamW and a cosine schedule).
    No labels are needed. What the healed adapter then predicts on the texts says nothing about the tasks, so documents
    of a task among the texts are refused.

    Args:
        adapter: a directory, or a Hub id.
        out: a directory, made if need be; its adapter is replaced, and only if a rank PASSes.
        base, tasks, margin, alpha, guards, groups, tokenizer, limit, used_documents, cache, options, progress: as in
            `lorakit.evaluation.certify`.
        heal_steps: how many steps; 0: no healing.
        heal_text: what it learns from: a list of texts, a source of `lorakit.data.loader`, or batches with `labels`.
        heal_learning_rate, heal_length, heal_seed: the first learning rate, the longest text in tokens, and the seed of
            their order.
        overwrite, verify: as in `truncate`.
    Raises: EvaluationError for an adapter of rank 1, for healing that has no texts, no finite loss, or texts that a
        task has too, and as `certify`; as `truncate`.
    Reference: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays:
        a-priori ordered hypotheses", 1995.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size))
        >>> adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        >>> ids = torch.arange(32).view(8, 4)
        >>> directory = tempfile.mkdtemp()
        >>> adapter.save_pretrained(directory)
        >>> base = adapter.unload()
        >>> from lorakit.evaluation import loss
        >>> task = loss([{"input_ids": ids, "labels": ids}])
        >>> smallest(directory, directory + "-small", base=base, tasks=task, margin=1.0, progress=False).rank
        1
    """
    check_overwrite(out, [adapter], overwrite=overwrite)
    source = os.fspath(adapter)
    view = open_adapter(adapter)
    view.check()
    rank_before = max((module.rank for module in view.modules), default=0)
    ladder = [rank for rank in LADDER if rank < rank_before]
    if not ladder:
        raise EvaluationError(f"`adapter` must have a rank above 1; {source!r} has rank {rank_before}.")
    question = Question(
        tasks=tasks,
        margin=margin,
        alpha=alpha,
        guards=guards,
        groups=groups,
        tokenizer=tokenizer,
        limit=limit,
        used_documents=used_documents,
        cache=cache,
        options=options,
        progress=progress,
    )

    comparison = Comparison(base, question, reference=adapter)
    healing = None
    if heal_steps or heal_text is not None:
        settings = HealSettings(steps=heal_steps, learning_rate=heal_learning_rate, length=heal_length, seed=heal_seed)
        healing = prepare(comparison.model, adapter, heal_text, comparison.tokenizer, settings, progress=progress)
        comparison.question = replace(question, used_documents=[*used_documents, *healing.documents])

    def write(directory: str, rank: int) -> Rung:
        report = truncate(adapter, directory, max_rank=rank, verify=verify)
        healed = None if healing is None else healing.heal(comparison.model, directory)
        return Rung(report, report.energy_kept, healed)

    return descend(adapter, out, ladder, write, comparison, source)
