"""A bench: train probes at a high rank, audit them, and test lower ranks against them over several seeds.

Reference: Gradience's bench ("Stop Wasting LoRA Capacity: Spectral Auditing and Evidence-Based Compression", 2026).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._checks import check_number
from lorakit._report import Report
from lorakit.errors import EvaluationError, Finding
from lorakit.evaluation import LoadOptions, Task
from lorakit.evaluation._digests import data_digest, digest
from lorakit.experiments import _bench_trials as trials
from lorakit.experiments._bench_ranks import BenchRanks, ranks_to_test
from lorakit.experiments._bench_report import BenchReport, BenchVariant
from lorakit.experiments._bench_settings import (
    BenchSettings,
    Policy,
    check_gate,
    check_policies,
    check_probe,
    check_seeds,
    check_train,
    check_training,
    hypothesis_of,
    one_or_more,
)
from lorakit.experiments._bench_verdicts import BenchGate, BenchScores, gates, judge, overall
from lorakit.experiments._plan import Trial, run_plan
from lorakit.lens import audit
from lorakit.naming.patterns import compact_pattern

if TYPE_CHECKING:
    from peft import LoraConfig

Results = Mapping[str, dict[str, Any]]


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
    shard: Any = None,
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
        steps, learning_rate, batch_size, weight_decay, warmup_steps: of every training, as in
            `lorakit.experiments.rank_sweep`.
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
    hypothesis = hypothesis_of(tasks, margin, alpha)
    one_or_more(retrain, truncate)
    fields = check_probe(probe)
    settings = BenchSettings(
        base=os.fspath(base),
        options=options or LoadOptions(),
        data=check_train(train),
        probe=fields,
        training=check_training(steps, batch_size, learning_rate, weight_decay, warmup_steps),
        seeds=check_seeds(seeds),
        policies=check_policies(policies, fields["r"]),
        retrain=bool(retrain),
        cut=bool(truncate),
        energy=check_number("energy", energy, above=0, most=1),
        hypothesis=hypothesis,
        gate=check_gate(gate, hypothesis.margins),
        tolerance=None if tolerance is None else check_number("tolerance", tolerance, above=0),
        directory=Path(directory),
    )
    try:
        report = _Bench(settings, executor, shard, progress).run()
    except _MissingTrials as waiting:
        return waiting.report
    finally:
        trials.loaded_base.cache_clear()
    report.save(settings.directory)
    return report


@dataclass(frozen=True, repr=False)
class UnfinishedBench(Report):
    """A shard has done its part of a stage, and other shards have not yet recorded theirs."""

    directory: str
    stage: str
    finished: int
    missing: tuple[str, ...]
    shards: tuple[str, ...]

    verdict = "INCONCLUSIVE"

    @property
    def headline(self) -> str:
        """What is missing, in a line."""
        total = self.finished + len(self.missing)
        return (
            f"Not finished: {self.finished} of {total} trials of the stage {self.stage!r} have a record; missing are "
            f"{', '.join(self.missing[:5])}{' …' if len(self.missing) > 5 else ''}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        """Which shards go on."""
        return (f"they belong to the shards {', '.join(self.shards)}; then every shard goes on by the same call",)

    def rows(self) -> list[dict[str, Any]]:
        """One row a missing trial."""
        return [{"stage": self.stage, "trial": key} for key in self.missing]


class _MissingTrials(Exception):
    def __init__(self, report: UnfinishedBench) -> None:
        super().__init__(report.headline)
        self.report = report


@dataclass(frozen=True)
class _Adapter:
    """An adapter of a bench: its name, where it is, and the hash of its weights."""

    name: str
    path: str
    record: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return str(self.record["sha256"])


class _Bench:
    """The stages of a bench; each is a plan whose trials have records."""

    def __init__(self, settings: BenchSettings, executor: Executor | None, shard: Any, progress: bool) -> None:
        self._settings = settings
        self._call = {"executor": executor, "shard": shard, "progress": progress}
        self._progress = progress and executor is None
        self._data_sha256 = data_digest(settings.data["source"])
        self._fingerprints = {task.name: task.fingerprint() for task in settings.tasks}
        self._scored: list[dict[str, Any]] = []

    def run(self) -> BenchReport:
        """Every stage, up to the report."""
        settings = self._settings
        start = self._stage("base model", [self._read_data(), *(self._score(None, task) for task in settings.tasks)])
        base = self._scores_of([None], start)[0]
        self._refuse_trained(start["data"]["documents"], base)
        probes = self._made("probes", [self._train("probe", seed, settings.probe) for seed in settings.seeds])
        probe_scores = self._evaluated("scores of the probes", probes)
        scores = BenchScores(
            documents={task.name: tuple(base[task.name]["documents"]) for task in settings.tasks},
            base={task.name: tuple(base[task.name]["scores"]) for task in settings.tasks},
            probe=self._by_task(probe_scores, base),
            variants={},
        )
        gate = gates(scores, settings.gate, settings.hypothesis.alpha)
        if not all(row.passed for row in gate):
            return self._report(scores, gate, probes, {}, [])
        audits = [audit(probe.path, energy=settings.energy, suggest_ranks=True) for probe in probes]
        ranks = ranks_to_test(audits, settings.policies, settings.energy)
        made = self._variants(ranks, probes)
        everything = [adapter for seeds in made.values() for adapter in seeds]
        found = self._evaluated("scores of the variants", everything)
        width = len(settings.seeds)
        variants = {
            name: self._by_task(found[i * width : (i + 1) * width], base) for i, name in enumerate(made)
        }
        return self._report(replace(scores, variants=variants), gate, probes, made, ranks)

    def _stage(self, name: str, plan: Sequence[Trial]) -> Results:
        results = run_plan(plan, self._settings.directory / "records", **self._call)
        missing = tuple(trial.key for trial in plan if trial.key not in results)
        if missing:
            shards = _shards(plan, missing, self._call["shard"])
            raise _MissingTrials(
                UnfinishedBench(str(self._settings.directory), name, len(plan) - len(missing), missing, shards)
            )
        return results
