"""The stages of a bench: each is a plan of trials, whose results the next one needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lorakit.errors import EvaluationError, Finding
from lorakit.experiments._bench_plan import DATA_KEY, BenchAdapter, BenchPlan, plain_config, score_key
from lorakit.experiments._bench_ranks import BenchRanks, ranks_to_test
from lorakit.experiments._bench_report import BenchReport, BenchVariant, Method
from lorakit.experiments._bench_settings import BenchSettings
from lorakit.experiments._bench_verdicts import BenchGate, BenchScores, Judgement, gates, judge, overall
from lorakit.experiments._plan import Shard, Trial
from lorakit.experiments._stages import run_stage
from lorakit.lens import audit

Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class _Made:
    """The adapters of a variant, one for each seed."""

    ranks: BenchRanks
    method: Method
    adapters: Sequence[BenchAdapter]

    @property
    def name(self) -> str:
        return f"{' = '.join(self.ranks.policies)}, {self.method}"


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
        gate = gates(scores, settings.gate, settings.question.alpha)
        if not all(row.passed for row in gate):
            return self._report(scores, gate, probes, [])
        audits = [audit(probe.path, energy=settings.energy, suggest_ranks=True) for probe in probes]
        ranks = ranks_to_test(audits, settings.policies, settings.energy)
        made = self._variants(ranks, probes)
        found = iter(self._evaluated("scores of the variants", [adapter for one in made for adapter in one.adapters]))
        variants = {one.name: self._by_task([next(found) for _ in one.adapters], base) for one in made}
        return self._report(replace(scores, variants=variants), gate, probes, made)

    def _stage(self, name: str, plan: Sequence[Trial]) -> Results:
        return run_stage(
            name,
            plan,
            self._settings.directory,
            executor=self._executor,
            shard=self._shard,
            progress=self._progress,
        )

    def _made(self, stage: str, plan: Sequence[tuple[str, Trial]]) -> list[BenchAdapter]:
        results = self._stage(stage, [trial for _, trial in plan])
        return [BenchAdapter(trial.key, path, results[trial.key]) for path, trial in plan]

    def _variants(self, ranks: Sequence[BenchRanks], probes: Sequence[BenchAdapter]) -> list[_Made]:
        settings = self._settings
        plan: list[tuple[BenchRanks, Method, list[tuple[str, Trial]]]] = []
        for one in ranks:
            config = plain_config(one, settings.probe)
            if settings.retrain:
                trained = [self._plan.train(f"{one.label} retrained", seed, config) for seed in settings.seeds]
                plan.append((one, "retrained", trained))
            if settings.cut:
                pairs = zip(settings.seeds, probes, strict=True)
                plan.append((one, "truncated", [self._plan.cut(one, seed, probe) for seed, probe in pairs]))
        made = iter(self._made("variants", [pair for _, _, pairs in plan for pair in pairs]))
        return [_Made(one, method, [next(made) for _ in pairs]) for one, method, pairs in plan]

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
        made: Sequence[_Made],
    ) -> BenchReport:
        settings = self._settings
        judged = judge(scores, settings.question.margins, settings.question.alpha, settings.tolerance)
        variants = [_variant(one, judged[one.name]) for one in made]
        everything = [*probes, *(adapter for one in made for adapter in one.adapters)]
        first = self._scored[0]
        report = BenchReport(
            verdict=overall(gate, [variant.verdict for variant in variants]),
            base=settings.base,
            seeds=settings.seeds,
            alpha=settings.question.alpha,
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
                "adapters": {one.name: one.sha256 for one in everything},
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


def _variant(made: _Made, judged: Judgement) -> BenchVariant:
    energies = [adapter.record["energy_kept"] for adapter in made.adapters if "energy_kept" in adapter.record]
    return BenchVariant(
        name=made.name,
        method=made.method,
        policies=made.ranks.policies,
        ranks=made.ranks.suggestion.ranks,
        **_sizes(made.adapters),
        served_rank=made.ranks.suggestion.served_rank,
        energy_kept=sum(energies) / len(energies) if energies else None,
        adapters=tuple(adapter.path for adapter in made.adapters),
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
