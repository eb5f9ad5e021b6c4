"""A comparison of PEFT methods: trained on the same data in the same order, over several seeds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._checks import check_number
from lorakit.evaluation import LoadOptions
from lorakit.experiments._bench_settings import check_seeds
from lorakit.experiments._compare_kinds import ModelKind, loaded
from lorakit.experiments._compare_report import MethodsReport
from lorakit.experiments._compare_run import MethodsRun
from lorakit.experiments._compare_settings import (
    MethodsSettings,
    check_methods,
    check_model,
    check_rates,
    check_reference,
    check_tasks,
    check_train,
    check_training,
    check_validation,
)
from lorakit.experiments._plan import Shard
from lorakit.experiments._settings import Schedule
from lorakit.experiments._stages import UnfinishedBench, finished

if TYPE_CHECKING:
    from peft import PeftConfig


def compare_methods(
    base: str | os.PathLike[str],
    train: str | os.PathLike[str] | Mapping[str, Any],
    *,
    methods: Mapping[str, PeftConfig | Mapping[str, Any]],
    tasks: Any,
    directory: str | os.PathLike[str],
    model: ModelKind = "causal_lm",
    reference: str | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    learning_rates: Sequence[float] | None = None,
    validation: int | None = None,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    schedule: Schedule = "cosine",
    group_by_length: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    margin: float | None = None,
    alpha: float = 0.05,
    save_adapters: bool = True,
    options: LoadOptions | None = None,
    executor: Executor | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> MethodsReport | UnfinishedBench:
    """Train every method with every seed, score it on the tasks, and compare it with the reference.

    All trainings have the same data, order, steps and, of a model that classifies, the same new head for a seed. Where
    a method has several learning rates, it is first trained with the first seed at each of them; the one with the
    smallest loss on validation documents is taken. These are documents of the training data with the smallest hashes;
    no training sees them, and no score of a task has a part in the choice. Each method is then compared with the
    reference, paired by seed and document; outcomes are adjusted over the methods by Holm's method.

    Every training has a record in `directory`, with its scores, so that the same call goes on where an earlier one
    stopped. `methods.json` and `report.html` are written there.

    Args:
        base: the base model, a path or Hub id, with its tokenizer.
        train: a path or dataset id, or a mapping: its `source`, and options of `lorakit.data.loader`; of a model that
            classifies those of `lorakit.evaluation.classification`, such as `columns` and `length`. Documents of a task
            are left out.
        methods: by name, a PEFT config, or a mapping of its fields with `peft_type` ("LORA" if left out) and, if need
            be, a `learning_rate` or `learning_rates` of its own.
        tasks: a task or several; see `lorakit.evaluation.classification` and the functions beside it.
        directory: holds records, adapters and the report.
        model: "causal_lm"; or "sequence_classification" or "image_classification", whose new head every method trains
            in full.
        reference: the method that the others are compared with; None: the first.
        steps, epochs: how long every training is, in either of the two.
        learning_rate, learning_rates: one for all methods, or those to choose from.
        validation: how many documents the losses are of that learning rates are chosen by; None: a tenth of the
            training documents where there is something to choose, else 0.
        batch_size, weight_decay, warmup_steps, schedule: of every training, as in `lorakit.experiments.rank_sweep`.
        micro_batch_size: how many examples of a batch run at a time, where memory is short; None: all.
        warmup_ratio: the warm-up as a share of the steps, in place of `warmup_steps`.
        group_by_length: whether batches are of documents of similar length, which saves padding.
        seeds: at least three.
        margin: how much worse than the reference a method may be to PASS, in the units of the scores; a task's own
            margin wins. None: no verdicts.
        alpha: the level of each one-sided bound.
        save_adapters: whether every adapter is kept.
        options: how the base model is loaded.
        executor, shard, progress: as in `lorakit.experiments.run_plan`.
    Returns: a `MethodsReport`, or where a shard waits for others an `UnfinishedBench`.
    Raises: ValueError, TypeError, DataError, EvaluationError for arguments and data; PlanError for records of other
        settings; TrialError for trials that failed.

    Example:
        >>> import lorakit
        >>> lorakit.experiments.compare_methods(  # doctest: +SKIP
        ...     "base/", "train.jsonl", tasks=lorakit.evaluation.classification("test.jsonl", metric="mcc"),
        ...     methods={"LoRA": {"r": 8}, "DoRA": {"r": 8, "use_dora": True}}, model="sequence_classification",
        ...     epochs=3, learning_rates=[3e-4, 1e-3, 3e-3], directory="methods/",
        ... )
    """
    found = check_methods(methods, check_rates(learning_rate, learning_rates), check_model(model))
    wanted, margins = check_tasks(tasks, margin)
    length: dict[str, Any] = {
        "steps": steps,
        "epochs": epochs,
        "warmup_steps": warmup_steps,
        "warmup_ratio": warmup_ratio,
    }
    training: dict[str, Any] = {"batch_size": batch_size, "weight_decay": weight_decay, "schedule": schedule}
    training |= {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
    settings = MethodsSettings(
        base=os.fspath(base),
        options=options or LoadOptions(),
        model=model,
        data=check_train(train, model),
        methods=found,
        reference=check_reference(reference, found),
        tasks=wanted,
        margins=margins,
        alpha=check_number("alpha", alpha, above=0, most=0.5),
        seeds=check_seeds(seeds),
        training=check_training(**length, **training, group_by_length=bool(group_by_length)),
        validation=check_validation(validation, found),
        save_adapters=bool(save_adapters),
        directory=Path(directory),
    )
    run = MethodsRun(settings, executor=executor, shard=shard, progress=progress).run
    return finished(run, settings.directory, release=loaded.cache_clear)
