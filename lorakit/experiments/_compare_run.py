"""The stages of a comparison of methods: each is a plan of trials, whose results the next one needs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from lorakit.errors import EvaluationError, Finding
from lorakit.evaluation._digests import data_digest
from lorakit.experiments import _compare_trials as trials
from lorakit.experiments._compare_probes import probed_values, with_values
from lorakit.experiments._compare_report import ComparedMethod, MethodsReport, TriedRate
from lorakit.experiments._compare_settings import Method, MethodsSettings
from lorakit.experiments._compare_verdicts import MethodScores, compared, overall, verdicts
from lorakit.experiments._methods import prepared
from lorakit.experiments._plan import Shard, Trial
from lorakit.experiments._stages import run_stage
from lorakit.experiments._training import plain_config

Results = Mapping[str, dict[str, Any]]
_DATA = "training data"


class MethodsRun:
    """The stages of a comparison; each is a plan whose trials have records."""

    def __init__(
        self, settings: MethodsSettings, *, executor: Executor | None, shard: Shard | None, progress: bool
    ) -> None:
        self._settings = settings
        self._where: dict[str, Any] = {"executor": executor, "shard": shard, "progress": progress}
        self._show_steps = progress and executor is None
        self._fingerprints = {task.name: task.fingerprint() for task in settings.tasks}
        self._data_sha256 = data_digest(settings.data["source"])
        self._data: dict[str, Any] = {}
        self._probes: Results = {}

    def run(self) -> MethodsReport:
        """Every stage, up to the report."""
        settings = self._settings
        self._data = self._stage("training data", [self._read_data()])[_DATA]
        owners = [one for one in settings.methods if one.probe is not None and one.probe.of == one.name]
        if owners:
            self._probes = self._stage("probes", [self._probe(one) for one in owners])
        tuned = [one for one in settings.methods if len(one.learning_rates) > 1]
        first = settings.seeds[0]
        tries = [self._train(one, rate, first) for one in tuned for rate in one.learning_rates]
        tried = self._stage("learning rates", tries) if tries else {}
        chosen = {one.name: self._chosen(one, tried) for one in settings.methods}
        plan = [self._train(one, chosen[one.name], seed) for seed in settings.seeds for one in settings.methods]
        return self._report(chosen, tried, self._stage("trainings", plan))

    def _stage(self, name: str, plan: Sequence[Trial]) -> Results:
        return run_stage(name, plan, self._settings.directory, **self._where)

    def _shared(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and settings of every trial."""
        settings = self._settings
        arguments = {"base": settings.base, "options": settings.options, "tasks": settings.tasks}
        stated = {
            "base": settings.base,
            "options": asdict(settings.options),
            "model": settings.model,
            "train": dict(settings.data),
            "train_sha256": self._data_sha256,
            "tasks": self._fingerprints,
        }
        return arguments, stated

    def _read_data(self) -> Trial:
        settings = self._settings
        arguments, stated = self._shared()
        own = {"kind": settings.model, "data": settings.data, "validation": settings.validation}
        return Trial(_DATA, trials.read_data, arguments | own, stated | {"validation": settings.validation})

    def _probe(self, method: Method) -> Trial:
        assert method.probe is not None
        settings, seed = method.probe.settings, self._settings.seeds[0]
        arguments, stated = self._shared()
        own = {"config": method.config, "settings": settings, "training": self._settings.training.more, "seed": seed}
        return Trial(
            _probe_key(method.name),
            probed_values,
            {name: arguments[name] for name in ("base", "options")} | own | {"data": self._given()},
            stated | own | {"config": plain_config(method.config)} | self._trained_on(),
        )

    def _config(self, method: Method, seed: int) -> Any:
        """A method's config for one seed."""
        if method.probe is None:
            return method.config
        shuffle = None if method.probe.shuffle_seed is None else method.probe.shuffle_seed + seed
        return with_values(method.config, self._probes[_probe_key(method.probe.of)], shuffle)

    def _given(self) -> dict[str, Any]:
        """The data as trials take them."""
        known = {name: self._data[name] for name in ("left_out", "validation", "num_labels")}
        return {"kind": self._settings.model, "train": self._settings.data, "progress": self._show_steps} | known

    def _trained_on(self) -> dict[str, Any]:
        return {name: self._data[name] for name in ("trained_sha256", "validation_sha256", "num_labels")}

    def _train(self, method: Method, rate: float, seed: int) -> Trial:
        settings = self._settings
        arguments, stated = self._shared()
        training = {**settings.training.on(self._data["documents"]), "learning_rate": rate}
        config = prepared(method.name, self._config(method, seed), training["steps"], own_loop=False)
        key = _key(method, rate, seed)
        out = os.fspath(settings.directory / "adapters" / re.sub(r"[^\w.-]+", "-", key))
        return Trial(
            key,
            trials.train_and_score,
            arguments
            | {"data": self._given(), "config": config, "training": training, "seed": seed}
            | {"out": out if settings.save_adapters else None},
            stated | {"config": plain_config(config), "training": training, "seed": seed} | self._trained_on(),
        )

    def _chosen(self, method: Method, tried: Results) -> float:
        """The learning rate with the smallest validation loss; of equal ones the smallest."""
        if len(method.learning_rates) == 1:
            return method.learning_rates[0]
        rates = method.learning_rates
        return min(
            rates, key=lambda rate: (tried[_key(method, rate, self._settings.seeds[0])]["validation_loss"], rate)
        )

    def _report(self, chosen: Mapping[str, float], tried: Results, results: Results) -> MethodsReport:
        settings = self._settings
        records = {
            one.name: [results[_key(one, chosen[one.name], seed)] for seed in settings.seeds]
            for one in settings.methods
        }
        first = records[settings.reference][0]
        self._check_same(first, [record for found in records.values() for record in found])
        scores = _scores(first, records, [task.name for task in settings.tasks])
        rows = compared(scores, settings.reference, settings.alpha)
        judged = verdicts(scores, settings.reference, settings.margins, settings.alpha) if settings.margins else {}
        report = MethodsReport(
            verdict=overall([one.verdict for one in judged.values()]),
            base=settings.base,
            model=settings.model,
            reference=settings.reference,
            seeds=settings.seeds,
            alpha=settings.alpha,
            methods=tuple(
                ComparedMethod(
                    name=one.name,
                    peft_type=one.peft_type,
                    parameters=records[one.name][0]["parameters"],
                    head_parameters=records[one.name][0]["head_parameters"],
                    learning_rate=chosen[one.name],
                    tried=self._tried(one, tried),
                    train_loss=_mean([record["train_loss"] for record in records[one.name]]),
                    train_seconds=_mean([record["train_seconds"] for record in records[one.name]]),
                    adapters=tuple(_path(settings, one, chosen[one.name], seed) for seed in settings.seeds)
                    if settings.save_adapters
                    else (),
                    verdict=judged.get(one.name),
                    tasks=rows[one.name],
                )
                for one in settings.methods
            ),
            findings=tuple(self._findings(chosen)),
            data={key: value for key, value in self._data.items() if key != "left_out"} | self._length(),
            settings=settings.record(),
            hashes={"base": first["base_sha256"], "train": self._data_sha256, "tasks": self._fingerprints},
            environment={**first["environment"], "device": first["device"]},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            scores=scores,
        )
        return replace(report, sha256=report.signed())

    def _length(self) -> dict[str, int]:
        found = self._settings.training.on(self._data["documents"])
        return {name: found[name] for name in ("steps", "warmup_steps")}

    def _tried(self, method: Method, tried: Results) -> tuple[TriedRate, ...]:
        if len(method.learning_rates) == 1:
            return ()
        seed = self._settings.seeds[0]
        records = ((rate, tried[_key(method, rate, seed)]) for rate in method.learning_rates)
        return tuple(TriedRate(rate, record["validation_loss"], record["train_loss"]) for rate, record in records)

    def _check_same(self, first: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            if record["base_sha256"] != first["base_sha256"]:
                raise EvaluationError(
                    f"The base model {self._settings.base!r} changed between two trainings. Use another directory for "
                    f"the new one."
                )
            for name, one in record["scores"].items():
                reference = first["scores"][name]
                if one["settings"] != reference["settings"] or one["documents"] != reference["documents"]:
                    raise EvaluationError(
                        f"Task {name!r} was scored in two ways. Score all methods with the same versions and dtype."
                    )

    def _findings(self, chosen: Mapping[str, float]) -> list[Finding]:
        found = [
            Finding(
                "warning",
                "learning_rate_at_edge",
                None,
                f"{one.name}: the chosen learning rate {chosen[one.name]:g} is at the edge of its grid; a better one "
                f"may lie outside.",
            )
            for one in self._settings.methods
            if len(one.learning_rates) > 1 and chosen[one.name] in (one.learning_rates[0], one.learning_rates[-1])
        ]
        for task, count in self._data["overlap"].items():
            if count:
                message = f"{count} documents of {task} are also in the training data; they were not trained on."
                found.append(Finding("info", "overlap_left_out", None, message))
        for task in self._data["unchecked"]:
            message = (
                f"{task}: its documents are not compared with those that are trained on, since the two are in "
                f"different forms. Make sure that none is in both."
            )
            found.append(Finding("info", "overlap_not_checked", None, message))
        return found


def _key(method: Method, rate: float, seed: int) -> str:
    return f"{method.name}, learning rate {rate:g}, seed {seed}"


def _probe_key(name: str) -> str:
    return f"probe of {name}"


def _path(settings: MethodsSettings, method: Method, rate: float, seed: int) -> str:
    return os.fspath(settings.directory / "adapters" / re.sub(r"[^\w.-]+", "-", _key(method, rate, seed)))


def _scores(first: Mapping[str, Any], records: Mapping[str, Sequence[Any]], tasks: Sequence[str]) -> MethodScores:
    known = {task: first["scores"][task] for task in tasks}
    return MethodScores(
        documents={task: tuple(one["documents"]) for task, one in known.items()},
        metrics={task: one["metric"] for task, one in known.items()},
        labels={task: None if one["labels"] is None else tuple(one["labels"]) for task, one in known.items()},
        methods={
            name: {task: tuple(tuple(record["scores"][task]["scores"]) for record in found) for task in tasks}
            for name, found in records.items()
        },
    )


def _mean(values: Sequence[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers)
