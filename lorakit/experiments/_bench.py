"""A bench: train probes at a high rank, audit them, and test lower ranks against them over several seeds.

Reference: Gradience's bench ("Stop Wasting LoRA Capacity: Spectral Auditing and Evidence-Based Compression", 2026).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._checks import check_number
from lorakit.evaluation import LoadOptions
from lorakit.experiments._bench_report import BenchReport
from lorakit.experiments._bench_run import BenchRun
from lorakit.experiments._bench_settings import (
    BenchSettings,
    Policy,
    check_gate,
    check_policies,
    check_probe,
    check_seeds,
    check_train,
    check_training,
    one_or_more,
    question_of,
)
from lorakit.experiments._bench_trials import loaded_base
from lorakit.experiments._plan import Shard
from lorakit.experiments._settings import Schedule
from lorakit.experiments._stages import UnfinishedBench, finished

if TYPE_CHECKING:
    from peft import LoraConfig


def bench(
    base: str | os.PathLike[str],
    train: str | os.PathLike[str] | Mapping[str, Any],
    *,
    tasks: Any,
    margin: float,
    probe: LoraConfig | Mapping[str, Any],
    directory: str | os.PathLike[str],
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: Schedule = "cosine",
    group_by_length: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    policies: Sequence[Policy] = ("global_median", "global_p90", "per_module", "knee"),
    retrain: bool = True,
    truncate: bool = True,
    energy: float = 0.9,
    alpha: float = 0.05,
    gate: float | None = None,
    tolerance: float | None = 0.025,
    options: LoadOptions | None = None,
    executor: Executor | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> BenchReport | UnfinishedBench:
    """Train probes at a high rank, audit them, and test against them what is trained at, and cut to, lower ranks.

    For each seed a probe is trained and audited. If the probes are good enough (`gate`), adapters are trained from the
    base model at the suggested ranks, on the same data in the same order, and the probes are cut to these ranks. A
    policy's rank of a module is the median over the seeds' suggestions, so that all seeds of a variant have one config,
    the one that the verdict is of. Policies that suggest the same ranks are one variant. Every module keeps the probe's
    scaling. Each variant's scores are compared with the probe's, paired by seed and document; verdicts are adjusted
    over the variants by Holm's method.

    Every training, cut, and adapter on a task has a record in `directory`, so that the same call goes on where an
    earlier one stopped; a training that was interrupted starts anew. `bench.json` and `report.html` are written there.

    Args:
        base: the base model, a path or Hub id, with its tokenizer.
        train: a path or dataset id, or a mapping: its `source`, and options of `lorakit.data.loader`, such as
            `length` and `columns`.
        tasks: a task or several on documents that are not trained on; see `lorakit.evaluation.loss` and the functions
            beside it.
        margin: how much worse than the probe a variant may be, in the units of the scores; a task's own margin wins.
        probe: a LoraConfig, or a mapping of its fields, of high rank.
        directory: holds records, adapters and the report.
        steps, learning_rate, batch_size, weight_decay, warmup_steps, schedule: of every training, as in
            `lorakit.experiments.rank_sweep`.
        group_by_length: whether batches are of documents of similar length, which saves padding.
        seeds: at least three.
        policies: of "global_median", "global_p90", "per_module", "knee" and "entropy", as in `lorakit.lens.audit`; an
            integer is one rank for all modules.
        retrain, truncate: whether to train at the ranks, and whether to cut the probes to them.
        energy: the share of each ‖ΔW‖_F² that suggested ranks keep.
        alpha: the level of each one-sided bound.
        gate: the probe is worth compressing if the lower bound of probe − base exceeds this on every task; None: the
            task's margin, since below it a model without an adapter might PASS.
        tolerance: Gradience's policy, beside the verdict: no seed's mean is worse by more than this; None: no policy.
        options: how the base model is loaded.
        executor, shard, progress: as in `lorakit.experiments.run_plan`.
    Returns: a `BenchReport`, or where a shard waits for others an `UnfinishedBench`.
    Raises: ValueError, TypeError, EvaluationError for arguments, documents that are trained on, adapters that were
        changed; PlanError for records of other settings; TrialError for trials that failed.

    Example:
        >>> import lorakit
        >>> lorakit.experiments.bench(  # doctest: +SKIP
        ...     "base/", "train.jsonl", tasks="test.jsonl", margin=0.02, probe={"r": 64, "lora_alpha": 64},
        ...     directory="bench/", steps=500, learning_rate=2e-4,
        ... )
    """
    question = question_of(tasks, margin, alpha)
    one_or_more(retrain, truncate)
    fields = check_probe(probe)
    settings = BenchSettings(
        base=os.fspath(base),
        options=options or LoadOptions(),
        data=check_train(train),
        probe=fields,
        training=check_training(
            steps, batch_size, learning_rate, weight_decay, warmup_steps, schedule, group_by_length
        ),
        seeds=check_seeds(seeds),
        policies=check_policies(policies, fields["r"]),
        retrain=bool(retrain),
        cut=bool(truncate),
        energy=check_number("energy", energy, above=0, most=1),
        question=question,
        gate=check_gate(gate, question.margins),
        tolerance=None if tolerance is None else check_number("tolerance", tolerance, above=0),
        directory=Path(directory),
    )
    run = BenchRun(settings, executor=executor, shard=shard, progress=progress).run
    return finished(run, settings.directory, release=loaded_base.cache_clear)
