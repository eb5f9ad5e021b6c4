"""Plans: trainings and evaluations, each with a record file of its own, so that an interrupted plan continues."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from lorakit._records import Records, check_keys
from lorakit.errors import PlanError, TrialError

Shard = str | tuple[int, int]
_Settle = Callable[["Trial", dict[str, Any] | BaseException], None]
_SHOWN = 5  # trials in a message


@dataclass(frozen=True)
class Trial:
    """One training or evaluation of a plan: a picklable call whose result is JSON data, kept in a record file.

    `key` is unique in the plan. `function` is one of a module's top level, and `arguments` can be pickled, so that
    another process can run it. `settings` is JSON data that identifies the trial: a record with other settings is an
    error.
    """

    key: str
    function: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]


class PlanResults(dict[str, dict[str, Any]]):
    """The results of a plan's trials by key, in the plan's order. `missing`: the trials that have no record yet."""

    def __init__(self, results: Mapping[str, dict[str, Any]], missing: Iterable[str] = ()) -> None:
        super().__init__(results)
        self.missing = tuple(missing)

    def __repr__(self) -> str:
        text = f"{len(self)} of {len(self) + len(self.missing)} trials have a record"
        return f"{text}; missing: {_listed(self.missing)}" if self.missing else text


def run_plan(
    trials: Sequence[Trial],
    directory: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> PlanResults:
    """Run the trials that have no record in `directory` yet, and return the results of all that have one.

    This process writes a record as soon as a trial ends. If this process or a worker is killed, only the trials under
    way are lost, and the same call continues. Several processes may use the same directory.

    Args:
        trials: the plan. Their order matters for `shard` only.
        directory: is made if it does not exist. It keeps one JSON file a trial.
        executor: any `concurrent.futures.Executor`, such as a ProcessPoolExecutor or
            `lorakit.experiments.RayExecutor`. None: this process, one trial after the other.
        shard: (i, n) or "i/n" runs only each n-th trial of the plan, from the i-th on, 1 ≤ i ≤ n. What the other shards
            have not recorded yet is `missing` in the result.
        progress: show a progress bar on stderr.

    A trial that raises does not stop the others.

    Raises: PlanError (a ValueError) for trials with the same key, settings that are not JSON data, an invalid shard,
        arguments that cannot be pickled, and records that are damaged or of other settings. TrialError (a
        RuntimeError), after all other trials, if trials raised or were lost with a worker; it names them.
    """
    trials = list(trials)
    check_keys([trial.key for trial in trials])
    mine = {trial.key for trial in in_shard(trials, shard)}
    records = Records(directory, {trial.key: trial.settings for trial in trials})
    results = {trial.key: found for trial in trials if (found := records.read(trial.key)) is not None}
    todo = [trial for trial in trials if trial.key in mine and trial.key not in results]
    failed: dict[str, BaseException] = {}
    done = len(mine) - len(todo)
    with tqdm(total=len(mine), initial=done, desc="plan", unit="trial", disable=not progress, delay=1.0) as bar:

        def settle(trial: Trial, outcome: dict[str, Any] | BaseException) -> None:
            if not isinstance(outcome, BaseException):
                try:
                    results[trial.key] = records.write(trial.key, outcome)
                except (TypeError, ValueError) as error:
                    outcome = error
            if isinstance(outcome, BaseException):
                failed[trial.key] = outcome
            bar.set_postfix_str(trial.key)
            bar.update()

        if executor is None:
            _run_here(todo, records, settle)
        else:
            _check_picklable(todo, executor)
            _run_on(executor, todo, settle)
    if failed:
        raise _error(trials, results, failed) from next(iter(failed.values()))
    return PlanResults(
        {trial.key: results[trial.key] for trial in trials if trial.key in results},
        [trial.key for trial in trials if trial.key not in results],
    )


def in_shard(trials: Sequence[Trial], shard: Shard | None) -> list[Trial]:
    """The trials of a shard, "i/n" or (i, n); all of them for None. Raises: PlanError."""
    if shard is None:
        return list(trials)
    number, count = read_shard(shard)
    return list(trials[number - 1 :: count])


def read_shard(shard: Shard) -> tuple[int, int]:
    """(i, n) of a shard, 1 ≤ i ≤ n. Raises: PlanError."""
    parts = shard.split("/") if isinstance(shard, str) else shard
    if isinstance(parts, Sequence) and len(parts) == 2:
        with contextlib.suppress(TypeError, ValueError):
            number, count = (int(part) if isinstance(part, str) else part for part in parts)
            if all(type(part) is int for part in (number, count)) and 1 <= number <= count:
                return number, count
    raise PlanError(f'`shard` must be "i/n" or (i, n) with 1 ≤ i ≤ n, such as "1/4"; got {shard!r}.')


def _run_here(todo: Sequence[Trial], records: Records, settle: _Settle) -> None:
    for trial in todo:
        outcome: dict[str, Any] | BaseException | None = records.read(trial.key)  # another process may have run it
        if outcome is None:
            try:
                outcome = trial.function(**trial.arguments)
            except Exception as error:
                outcome = error
        settle(trial, outcome)


def _run_on(executor: Executor, todo: Sequence[Trial], settle: _Settle) -> None:
    futures: dict[Future[dict[str, Any]], Trial] = {}
    try:
        for trial in todo:
            try:
                futures[executor.submit(trial.function, **trial.arguments)] = trial
            except BrokenExecutor as error:
                settle(trial, error)
        for future in as_completed(futures):
            settle(futures[future], future.exception() or future.result())
    finally:
        for future in futures:
            future.cancel()


def _check_picklable(trials: Sequence[Trial], executor: Executor) -> None:
    """Raises: PlanError for what a process pool cannot send to its workers; other executors have their own ways."""
    if not isinstance(executor, ProcessPoolExecutor):
        return
    for trial, name, value in _parts(trials):
        try:
            pickle.dumps(value)
        except Exception as error:
            raise PlanError(
                f"`{name}` of trial {trial.key!r} must be picklable, since another process runs it; got "
                f"{type(value).__name__} ({error}). Use functions and classes of a module's top level, or run the plan "
                f"without an executor."
            ) from error


def _parts(trials: Sequence[Trial]) -> Iterator[tuple[Trial, str, Any]]:
    """What the trials consist of, each object once."""
    seen: set[int] = set()
    for trial in trials:
        for name, value in {"function": trial.function, **trial.arguments}.items():
            if id(value) not in seen and not isinstance(value, bytes):
                seen.add(id(value))
                yield trial, name, value


def _error(
    trials: Sequence[Trial], results: Mapping[str, dict[str, Any]], failed: Mapping[str, BaseException]
) -> TrialError:
    raised = {key: error for key, error in failed.items() if not isinstance(error, BrokenExecutor)}
    lost = [key for key in failed if key not in raised]
    texts = [f"{key!r} ({type(error).__name__}: {error})" for key, error in list(raised.items())[:_SHOWN]]
    message = ""
    if raised:
        more = f", and {len(raised) - _SHOWN} more" if len(raised) > _SHOWN else ""
        message += f"{len(raised)} of {len(trials)} trials failed: {'; '.join(texts)}{more}. "
    if lost:
        broken = failed[lost[0]]
        message += (
            f"A worker died, and the executor with it ({type(broken).__name__}). {len(lost)} of {len(trials)} trials "
            f"were lost: {_listed(lost)}. Make a new executor. "
        )
    missing = tuple(trial.key for trial in trials if trial.key not in results)
    return TrialError(
        f"{message}The records of finished trials are kept, and the same call runs only what is missing.",
        missing=missing,
        failed=dict(failed),
    )


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(repr(key) for key in keys[:_SHOWN]) + more
