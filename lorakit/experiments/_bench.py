"""A bench: train probes at a high rank, audit them, and test lower ranks against them over several seeds.

Reference: Gradience's bench ("Stop Wasting LoRA Capacity: Spectral Auditing and Evidence-Based Compression", 2026).
"""

from __future__ import annotations

import os
import re
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
from lorakit.evaluation._digests import data_digest
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
from lorakit.experiments._plan import Shard, Trial, read_shard, run_plan
from lorakit.experiments._settings import Schedule
from lorakit.lens import audit

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
    schedule: Schedule = "cosine",
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
        training=check_training(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
        ),
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
    except _MissingTrialsError as waiting:
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


class _MissingTrialsError(Exception):
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

    def __init__(self, settings: BenchSettings, executor: Executor | None, shard: Shard | None, progress: bool) -> None:
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
        self._refuse_trained(start["training data"]["documents"], base)
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
        variants = {name: self._by_task(found[i * width : (i + 1) * width], base) for i, name in enumerate(made)}
        return self._report(replace(scores, variants=variants), gate, probes, made, ranks)

    def _stage(self, name: str, plan: Sequence[Trial]) -> Results:
        results = run_plan(plan, self._settings.directory / "records", **self._call)
        missing = tuple(trial.key for trial in plan if trial.key not in results)
        if missing:
            shards = _shards(plan, missing, self._call["shard"])
            raise _MissingTrialsError(
                UnfinishedBench(str(self._settings.directory), name, len(plan) - len(missing), missing, shards)
            )
        return results

    def _trial(self, key: str, function: Any, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> Trial:
        shared = {"base": self._settings.base, "options": self._settings.options}
        stated = {**settings, "base": self._settings.base, "options": asdict(self._settings.options)}
        return Trial(key, function, {**shared, **arguments}, stated)

    def _read_data(self) -> Trial:
        data = self._settings.data
        return self._trial("training data", trials.read_data, {"data": data}, self._data_settings)

    @property
    def _data_settings(self) -> dict[str, Any]:
        return {"train": dict(self._settings.data), "train_sha256": self._data_sha256}

    def _train(self, name: str, seed: int, config: Mapping[str, Any]) -> tuple[str, Trial]:
        full, training = f"{name}, seed {seed}", self._settings.training
        path = self._path(full)
        arguments = {"data": self._settings.data, "config": config, "training": training, "seed": seed}
        stated = {"config": config, "training": training, "seed": seed, **self._data_settings}
        trial = self._trial(full, trials.train, {**arguments, "out": path, "progress": self._progress}, stated)
        return path, trial

    def _cut(self, name: str, seed: int, probe: _Adapter, ranks: Mapping[str, int]) -> tuple[str, Trial]:
        full = f"{name}, seed {seed}"
        path = self._path(full)
        arguments = {"adapter": probe.path, "sha256": probe.sha256, "ranks": ranks, "out": path}
        return path, Trial(full, trials.cut, arguments, {"probe_sha256": probe.sha256, "ranks": dict(ranks)})

    def _path(self, name: str) -> str:
        return os.fspath(self._settings.directory / "adapters" / re.sub(r"[^\w.-]+", "-", name))

    def _score(self, adapter: _Adapter | None, task: Task) -> Trial:
        sha256 = None if adapter is None else adapter.sha256
        stated = {"task": task.name, "task_sha256": self._fingerprints[task.name], "adapter_sha256": sha256}
        path = None if adapter is None else adapter.path
        arguments = {"adapter": path, "sha256": sha256, "task": task, "progress": self._progress}
        return self._trial(_score_key(adapter, task), trials.score, arguments, stated)

    def _made(self, stage: str, plan: Sequence[tuple[str, Trial]]) -> list[_Adapter]:
        results = self._stage(stage, [trial for _, trial in plan])
        return [_Adapter(trial.key, path, results[trial.key]) for path, trial in plan]

    def _variants(self, ranks: Sequence[BenchRanks], probes: Sequence[_Adapter]) -> dict[str, list[_Adapter]]:
        """The adapters of every variant, one for each seed, by the variant's name."""
        settings = self._settings
        plan: dict[str, list[tuple[str, Trial]]] = {}
        for one in ranks:
            config = _plain_config(one, settings.probe)
            if settings.retrain:
                name = f"{one.title}, retrained"
                plan[name] = [self._train(f"{one.label} retrained", seed, config) for seed in settings.seeds]
            if settings.cut:
                name = f"{one.title}, truncated"
                plan[name] = [
                    self._cut(f"{one.label} truncated", seed, probe, one.suggestion.ranks)
                    for seed, probe in zip(settings.seeds, probes, strict=True)
                ]
        made = self._made("variants", [pair for pairs in plan.values() for pair in pairs])
        width = len(settings.seeds)
        return {name: made[i * width : (i + 1) * width] for i, name in enumerate(plan)}

    def _evaluated(self, stage: str, adapters: Sequence[_Adapter]) -> list[Results]:
        plan = [self._score(adapter, task) for adapter in adapters for task in self._settings.tasks]
        return self._scores_of(adapters, self._stage(stage, plan))

    def _scores_of(self, adapters: Sequence[_Adapter | None], results: Results) -> list[Results]:
        found: list[Results] = [
            {task.name: results[_score_key(adapter, task)] for task in self._settings.tasks} for adapter in adapters
        ]
        self._scored += [record for one in found for record in one.values()]
        first = self._scored[0]
        for record in self._scored:
            if record["base_sha256"] != first["base_sha256"]:
                raise EvaluationError(
                    f"The base model {self._settings.base!r} changed since the first score was computed. Use another "
                    f"directory for the new one."
                )
        return found

    def _by_task(self, adapters: Sequence[Results], base: Results) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The scores of each seed, in the order of the base model's documents."""
        return {
            task.name: tuple(_in_order(adapter[task.name], base[task.name], task.name) for adapter in adapters)
            for task in self._settings.tasks
        }

    def _refuse_trained(self, trained: Sequence[str], base: Results) -> None:
        for name, record in base.items():
            again = set(trained).intersection(record["documents"])
            if again:
                raise EvaluationError(
                    f"{len(again)} documents of task {name!r} are trained on: a verdict on them says nothing about "
                    f"others. Take them out of the task, or out of `train`."
                )

    def _report(
        self,
        scores: BenchScores,
        gate: Sequence[BenchGate],
        probes: Sequence[_Adapter],
        made: Mapping[str, Sequence[_Adapter]],
        ranks: Sequence[BenchRanks],
    ) -> BenchReport:
        settings = self._settings
        judged = judge(scores, settings.hypothesis.margins, settings.hypothesis.alpha, settings.tolerance)
        by_title = {one.title: one for one in ranks}
        variants = []
        for name, one in judged.items():
            title, _, method = name.rpartition(", ")
            variants.append(_variant(name, method, by_title[title], made[name], one))
        first = self._scored[0]
        report = BenchReport(
            verdict=overall(gate, [variant.verdict for variant in variants]),
            base=settings.base,
            seeds=settings.seeds,
            alpha=settings.hypothesis.alpha,
            tolerance=settings.tolerance,
            gate=tuple(gate),
            probe={**_sizes(probes), "rank_range": _rank_range(settings.probe), "adapters": [p.path for p in probes]},
            variants=tuple(variants),
            findings=tuple(self._findings()),
            settings=settings.record(),
            hashes={
                "base": first["base_sha256"],
                "train": self._data_sha256,
                "tasks": self._fingerprints,
                "adapters": {one.name: one.sha256 for seeds in (probes, *made.values()) for one in seeds},
            },
            environment={**first["environment"], "device": first["device"]},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            scores=scores,
        )
        return replace(report, sha256=report.signed())

    def _findings(self) -> list[Finding]:
        found = []
        for task in self._settings.tasks:
            if not hasattr(task, "length"):
                message = (
                    f"{task.name}: its documents are not compared with those that are trained on, since the two are "
                    f"in different forms. Make sure that none is in both."
                )
                found.append(Finding("info", "overlap_not_checked", None, message))
        return found


def _variant(name: str, method: Any, ranks: BenchRanks, adapters: Sequence[_Adapter], judged: Any) -> BenchVariant:
    energies = [adapter.record["energy_kept"] for adapter in adapters if "energy_kept" in adapter.record]
    return BenchVariant(
        name=name,
        method=method,
        policies=ranks.policies,
        ranks=ranks.suggestion.ranks,
        **_sizes(adapters),
        served_rank=ranks.suggestion.served_rank,
        energy_kept=sum(energies) / len(energies) if energies else None,
        adapters=tuple(adapter.path for adapter in adapters),
        verdict=judged.verdict,
        pass_p_value=judged.pass_p_value,
        fail_p_value=judged.fail_p_value,
        headline=judged.headline,
        tasks=judged.tasks,
    )


def _sizes(adapters: Sequence[_Adapter]) -> dict[str, int]:
    record = adapters[0].record
    return {"parameters": int(record["parameters"]), "size_bytes": int(record["size_bytes"])}


def _rank_range(probe: Mapping[str, Any]) -> list[int]:
    ranks = [probe["r"], *(probe.get("rank_pattern") or {}).values()]
    return [min(ranks), max(ranks)]


def _plain_config(ranks: BenchRanks, probe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the LoraConfig that trains at these ranks, as JSON data."""
    kept = {name: probe[name] for name in ("lora_dropout", "init_lora_weights", "task_type") if name in probe}
    config = ranks.suggestion.to_config(**kept)
    decided = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    fields = {name: getattr(config, name) for name in decided}
    return {**fields, "target_modules": sorted(ranks.suggestion.ranks), **kept}


def _score_key(adapter: _Adapter | None, task: Task) -> str:
    return f"{task.name} of {'the base model' if adapter is None else adapter.name}"


def _in_order(record: Mapping[str, Any], reference: Mapping[str, Any], task: str) -> tuple[float, ...]:
    """The scores in the order of the reference's documents. Raises: EvaluationError for other documents or settings."""
    if record["settings"] != reference["settings"]:
        raise EvaluationError(
            f"Task {task!r} was scored in two ways: {reference['settings']} and {record['settings']}. Score all "
            f"adapters with the same versions and dtype."
        )
    scores = dict(zip(record["documents"], record["scores"], strict=True))
    if scores.keys() != set(reference["documents"]):
        raise EvaluationError(f"Task {task!r} was scored on other documents than the base model's.")
    return tuple(scores[document] for document in reference["documents"])


def _shards(plan: Sequence[Trial], missing: Sequence[str], shard: Shard | None) -> tuple[str, ...]:
    """The shards, as "i/n", that the missing trials belong to."""
    n = read_shard(shard)[1]
    found = sorted({place % n + 1 for place, trial in enumerate(plan) if trial.key in missing})
    return tuple(f"{i}/{n}" for i in found)
