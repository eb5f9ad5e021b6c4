"""Plans: records, failures, shards, and what a kill of a worker or of the parent loses."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import trials
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import LorakitError, PlanError, TrialError
from lorakit.experiments import Trial, run_plan
from lorakit.experiments._plan import in_shard


def plan(count, function=trials.squared, **arguments):
    return [Trial(f"trial {x}", function, {"x": x, **arguments}, {"x": x}) for x in range(count)]


def _pool():
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def squares(results):
    return {key: result["squared"] for key, result in results.items()}


ALL = {f"trial {x}": x * x for x in range(6)}


def test_each_trial_runs_once(tmp_path):
    log = tmp_path / "log"
    results = run_plan(plan(6, log=log), tmp_path / "new" / "records", progress=False)
    assert list(results) == list(ALL)
    assert squares(results) == ALL
    assert results.missing == ()
    assert repr(results) == "6 of 6 trials have a record"
    again = run_plan(plan(6, log=log), tmp_path / "new" / "records", progress=False)
    assert again == results
    more = run_plan(plan(7, log=log), tmp_path / "new" / "records", progress=False)
    assert squares(more) == ALL | {"trial 6": 36}
    assert log.read_text().split() == [str(x) for x in range(7)]
    kept = sorted(path.name for path in (tmp_path / "new" / "records").iterdir())
    assert len(kept) == 7
    assert all(re.fullmatch(r"trial-\d-[0-9a-f]{8}\.json", name) for name in kept)


def test_results_are_what_json_gives_back(tmp_path):
    trial = Trial("a", _values, {}, {"b": (1, 2)})
    first = run_plan([trial], tmp_path, progress=False)
    assert first == {"a": {"tuple": [1, 0.1 + 0.2], "1": None}}
    assert run_plan([trial], tmp_path, progress=False) == first


def _values():
    return {"tuple": (1, 0.1 + 0.2), 1: None}


def test_keys_that_look_alike_as_file_names_have_files_of_their_own(tmp_path):
    keys = ["a/b", "a-b", "a b", "../a", "ä", "ö", ".", "x" * 300]
    results = run_plan(
        [Trial(key, trials.squared, {"x": i}, {}) for i, key in enumerate(keys)], tmp_path / "in", progress=False
    )
    assert squares(results) == {key: i * i for i, key in enumerate(keys)}
    assert len(list((tmp_path / "in").iterdir())) == len(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_others_finish_when_one_raises(tmp_path):
    flag = tmp_path / "flag"
    mixed = [*plan(2), Trial("bad", trials.unless, {"x": 7, "flag": flag}, {}), *plan(6)[2:]]
    with pytest.raises(TrialError) as raised:
        run_plan(mixed, tmp_path / "records", progress=False)
    assert str(raised.value) == (
        "1 of 7 trials failed: 'bad' (ValueError: no 7). The records of finished trials are kept, and the same call "
        "runs only what is missing."
    )
    assert isinstance(raised.value, LorakitError)
    assert raised.value.missing == ("bad",)
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.failed == {"bad": raised.value.__cause__}
    assert len(list((tmp_path / "records").iterdir())) == 6
    flag.touch()
    assert squares(run_plan(mixed, tmp_path / "records", progress=False)) == ALL | {"bad": 49}


def test_many_failures_are_counted(tmp_path):
    with pytest.raises(TrialError, match=r"9 of 9 trials failed: 'trial 0' \(.*'trial 4' \(ValueError: no 4\), and 4"):
        run_plan(plan(9, trials.unless, flag=tmp_path / "no"), tmp_path, progress=False)


@pytest.mark.parametrize("result", [{"loss": float("nan")}, {"model": object()}, [1.0]])
def test_results_that_are_not_json_data_are_failures(tmp_path, result):
    wrong = Trial("wrong", lambda: result, {}, {})
    with pytest.raises(
        TrialError, match=r"1 of 7 trials failed: 'wrong' \((Type|Value)Error: The result of a trial must be"
    ):
        run_plan([wrong, *plan(6)], tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 6


def test_records_of_other_settings_are_refused(tmp_path):
    settings = {"steps": 3, "config": {"r": 4, "alpha": 8}}
    run_plan([Trial("a", trials.squared, {"x": 2}, settings)], tmp_path, progress=False)
    changed = {"steps": 3, "config": {"r": 8, "alpha": 8}, "seed": 1}
    with pytest.raises(PlanError) as raised:
        run_plan([Trial("a", trials.squared, {"x": 2}, changed)], tmp_path, progress=False)
    assert str(raised.value) == (
        f"The record of 'a' in {str(tmp_path)!r} has other settings: config.r 4, now 8; seed absent, now 1. Use "
        f"another directory, or the same settings."
    )
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "result": 1}'])
def test_damaged_records_are_refused(tmp_path, text):
    run_plan(plan(1), tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with pytest.raises(PlanError, match="is not the record of a trial. Remove it, and the trial runs again"):
        run_plan(plan(1), tmp_path, progress=False)
    path.unlink()
    assert squares(run_plan(plan(1), tmp_path, progress=False)) == {"trial 0": 0}


def test_invalid_plans_are_refused(tmp_path):
    def run(*given, directory=tmp_path, **options):
        run_plan(given, directory, progress=False, **options)

    one = Trial("a", trials.squared, {"x": 1}, {})
    with pytest.raises(PlanError, match="`key` must be unique in a plan; 'a' is not"):
        run(one, one)
    with pytest.raises(PlanError, match="`key` of each trial must be a non-empty string; got 3"):
        run(Trial(3, trials.squared, {}, {}))
    with pytest.raises(PlanError, match="`settings` of trial 'a' must be JSON data: "):
        run(Trial("a", trials.squared, {"x": 1}, {"rate": float("inf")}))
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="need a directory; '.*file' is a file, or below one"):
        run(one, directory=tmp_path / "file")
    for shard in ("3/2", "0/2", "1", "a/b", (1, 2, 3), (1.0, 2), (True, 2), 1, ""):
        with pytest.raises(
            PlanError, match=r"`shard` must be \"i/n\" or \(i, n\) with 1 ≤ i ≤ n, such as \"1/4\"; got"
        ):
            run(one, shard=shard)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@given(st.integers(0, 40), st.integers(1, 12))
def test_shards_partition_a_plan(count, shards):
    whole = plan(count)
    parts = [in_shard(whole, (i, shards)) for i in range(1, shards + 1)]
    assert sorted(trial.key for part in parts for trial in part) == sorted(trial.key for trial in whole)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for i, part in enumerate(parts, start=1):
        assert part == in_shard(whole, f"{i}/{shards}")
        assert part == [trial for place, trial in enumerate(whole) if place % shards == i - 1]
    assert in_shard(whole, None) == whole


def test_shards_give_the_whole_together(tmp_path):
    log = tmp_path / "log"
    records = tmp_path / "records"
    first = run_plan(plan(6, log=log), records, shard="2/2", progress=False)
    assert squares(first) == {f"trial {x}": x * x for x in (1, 3, 5)}
    assert first.missing == ("trial 0", "trial 2", "trial 4")
    assert repr(first) == "3 of 6 trials have a record; missing: 'trial 0', 'trial 2', 'trial 4'"
    second = run_plan(plan(6, log=log), records, shard=(1, 2), progress=False)
    assert squares(second) == ALL
    assert second.missing == ()
    assert log.read_text().split() == list("135024")
    assert run_plan(plan(6, log=log), records, progress=False) == second
    assert log.read_text().split() == list("135024")


def test_several_processes_share_a_directory(tmp_path):
    found = {}

    def run(name):
        found[name] = run_plan(plan(6, trials.slowly, seconds=0.01), tmp_path, progress=False)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [squares(results) for results in found.values()] == [ALL] * 4
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.iterdir():
        json.loads(path.read_text())


@pytest.mark.slow
def test_a_process_pool(tmp_path):
    with _pool() as executor:
        with pytest.raises(PlanError, match=r"`log` of trial 'trial 0' must be picklable, since another .* got lock"):
            run_plan(plan(1, log=threading.Lock()), tmp_path, executor=executor, progress=False)
        with pytest.raises(PlanError, match=r"`function` of trial 'a' must be picklable"):
            run_plan([Trial("a", lambda: {}, {}, {})], tmp_path, executor=executor, progress=False)
        assert not list(tmp_path.iterdir())
        mixed = [*plan(6), Trial("bad", trials.unless, {"x": 7, "flag": tmp_path / "no"}, {})]
        with pytest.raises(TrialError, match=r"1 of 7 trials failed: 'bad' \(ValueError: no 7\)"):
            run_plan(mixed, tmp_path, executor=executor, progress=False)
        results = run_plan(plan(6), tmp_path, executor=executor, progress=False)
    assert squares(results) == ALL
    assert os.getpid() not in {result["process"] for result in results.values()}


@pytest.mark.slow
def test_a_killed_worker_loses_only_the_trials_under_way(tmp_path):
    flag, records = tmp_path / "flag", tmp_path / "records"
    killing = [
        *plan(2),
        Trial("killed", trials.killed, {"x": 7, "flag": flag, "after": 1.0}, {}),
        Trial("slow", trials.slowly, {"x": 8, "seconds": 30}, {}),
    ]
    with _pool() as executor, pytest.raises(TrialError) as raised:
        run_plan(killing, records, executor=executor, progress=False)
    assert str(raised.value) == (
        "A worker died, and the executor with it (BrokenProcessPool). 2 of 4 trials were lost: 'killed', 'slow'. Make "
        "a new executor. The records of finished trials are kept, and the same call runs only what is missing."
    )
    assert raised.value.missing == ("killed", "slow")
    before = {path: path.stat().st_mtime_ns for path in records.iterdir()}
    assert len(before) == 2
    killing[3] = Trial("slow", trials.squared, {"x": 8}, {})
    with _pool() as executor:
        results = run_plan(killing, records, executor=executor, progress=False)
    assert squares(results) == {"trial 0": 0, "trial 1": 1, "killed": 49, "slow": 64}
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the workers in /proc")
@pytest.mark.parametrize("executor", ["None", "experiments.process_pool(2, threads=1)"])
def test_a_killed_parent_loses_only_the_trials_under_way(tmp_path, executor):
    code = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(trials.__file__)!r})
        import trials
        from lorakit import experiments

        if __name__ == "__main__":
            plan = [
                experiments.Trial(f"trial {{x}}", trials.slowly, {{"x": x, "seconds": 0 if x < 3 else 60}}, {{"x": x}})
                for x in range(6)
            ]
            experiments.run_plan(plan, {str(tmp_path / "records")!r}, executor={executor}, progress=False)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    parent = subprocess.Popen([sys.executable, "-W", "ignore", script], start_new_session=True)
    try:
        records = tmp_path / "records"
        _wait(lambda: len(list(records.glob("*.json"))) == 3 or parent.poll() is not None, 120)
        assert parent.poll() is None
        time.sleep(0.5)
        workers = _group(parent.pid)
        parent.kill()
        parent.wait()
        _wait(lambda: not _group(parent.pid), 30)  # its workers end, too
    finally:
        for process in _group(parent.pid):
            os.kill(process, signal.SIGKILL)
    assert len(workers) >= (1 if executor == "None" else 3)
    log = tmp_path / "log"
    assert squares(run_plan(plan(6, log=log), records, progress=False)) == ALL
    assert log.read_text().split() == list("345")


def _wait(done, seconds):
    for _ in range(seconds * 20):
        if done():
            return
        time.sleep(0.05)
    pytest.fail(f"not done after {seconds} s")


def _group(leader):
    """The processes of a session that still run."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(directory.name))
    return found
