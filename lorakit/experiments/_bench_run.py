"""The stages of a bench: each is a plan of trials, whose results the next one needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lorakit._report import Report
from lorakit.errors import EvaluationError, Finding
from lorakit.experiments._bench_plan import DATA_KEY, BenchAdapter, BenchPlan, plain_config, score_key
from lorakit.experiments._bench_ranks import BenchRanks, ranks_to_test
from lorakit.experiments._bench_report import BenchReport, BenchVariant
from lorakit.experiments._bench_settings import BenchSettings
from lorakit.experiments._bench_verdicts import BenchGate, BenchScores, Judgement, gates, judge, overall
from lorakit.experiments._plan import Shard, Trial, read_shard, run_plan
from lorakit.lens import audit

Results = Mapping[str, dict[str, Any]]


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


class MissingTrialsError(Exception):
    def __init__(self, report: UnfinishedBench) -> None:
        super().__init__(report.headline)
        self.report = report


class BenchRun:
    """The stages of a bench; each is a plan whose trials have records."""

    def __init__(
        self, settings: BenchSettings, *, executor: Executor | None, shard: Shard | None, progress: bool
    ) -> None:
        self._settings = settings
        self._executor, self._shard, self._progress = executor, shard, progress
        self._plan = BenchPlan(settings, progress=progress and executor is None)
        self._scored: list[dict[str, Any]] = []

    def run(self) -> BenchReport:
        """Every stage, up to the report."""
        settings = self._settings
        start = self._stage(
            "base model", [self._plan.read_data(), *(self._plan.score(None, task) for task in settings.tasks)]
        )
        base = self._scores_of([None], start)[0]
        self._refuse_trained(start[DATA_KEY]["documents"], base)
        probes = self._made("probes", [self._plan.train("probe", seed, settings.probe) for seed in settings.seeds])
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
        results = run_plan(
            plan,
            self._settings.directory / "records",
            executor=self._executor,
            shard=self._shard,
            progress=self._progress,
        )
        if results.missing and self._shard is not None:
            raise MissingTrialsError(
                UnfinishedBench(
                    directory=str(self._settings.directory),
                    stage=name,
                    finished=len(results),
                    missing=results.missing,
                    shards=_shards(plan, results.missing, self._shard),
                )
            )
        return results

    def _made(self, stage: str, plan: Sequence[tuple[str, Trial]]) -> list[BenchAdapter]:
        results = self._stage(stage, [trial for _, trial in plan])
        return [BenchAdapter(trial.key, path, results[trial.key]) for path, trial in plan]

    def _variants(self, ranks: Sequence[BenchRanks], probes: Sequence[BenchAdapter]) -> dict[str, list[BenchAdapter]]:
        """The adapters of every variant, one for each seed, by the variant's name."""
        settings = self._settings
        plan: dict[str, list[tuple[str, Trial]]] = {}
        for one in ranks:
            config = plain_config(one, settings.probe)
            if settings.retrain:
                name = f"{one.title}, retrained"
                plan[name] = [self._plan.train(f"{one.label} retrained", seed, config) for seed in settings.seeds]
            if settings.cut:
                name = f"{one.title}, truncated"
                plan[name] = [
                    self._plan.cut(f"{one.label} truncated", seed, probe, one.suggestion.ranks)
                    for seed, probe in zip(settings.seeds, probes, strict=True)
                ]
        made = self._made("variants", [pair for pairs in plan.values() for pair in pairs])
        width = len(settings.seeds)
        return {name: made[i * width : (i + 1) * width] for i, name in enumerate(plan)}

    def _evaluated(self, stage: str, adapters: Sequence[BenchAdapter]) -> list[Results]:
        plan = [self._plan.score(adapter, task) for adapter in adapters for task in self._settings.tasks]
        return self._scores_of(adapters, self._stage(stage, plan))

    def _scores_of(self, adapters: Sequence[BenchAdapter | None], results: Results) -> list[Results]:
        found: list[Results] = [
            {task.name: results[score_key(adapter, task)] for task in self._settings.tasks} for adapter in adapters
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
        probes: Sequence[BenchAdapter],
        made: Mapping[str, Sequence[BenchAdapter]],
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
                "train": self._plan.data_sha256,
                "tasks": self._plan.fingerprints,
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


def _variant(
    name: str, method: Any, ranks: BenchRanks, adapters: Sequence[BenchAdapter], judged: Judgement
) -> BenchVariant:
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


def _sizes(adapters: Sequence[BenchAdapter]) -> dict[str, int]:
    record = adapters[0].record
    return {"parameters": int(record["parameters"]), "size_bytes": int(record["size_bytes"])}


def _rank_range(probe: Mapping[str, Any]) -> list[int]:
    ranks = [probe["r"], *(probe.get("rank_pattern") or {}).values()]
    return [min(ranks), max(ranks)]


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


def _shards(plan: Sequence[Trial], missing: Sequence[str], shard: Shard) -> tuple[str, ...]:
    """The shards, as "i/n", that the missing trials belong to."""
    n = read_shard(shard)[1]
    found = sorted({place % n + 1 for place, trial in enumerate(plan) if trial.key in missing})
    return tuple(f"{i}/{n}" for i in found)
