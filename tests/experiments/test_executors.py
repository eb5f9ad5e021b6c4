"""Rank sweeps and layer gains on process pools and on a local Ray, against the same in this process."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError

import pytest
import torch
import trials
from peft import LoraConfig

from lorakit import experiments
from lorakit.errors import MissingExtraError, PlanError, TrialError
from lorakit.experiments import Trial, _work, run_plan

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
SETTINGS = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "progress": False}
SWEEP = {"ranks": (2, 4), "seeds": (0, 1), **SETTINGS}


@pytest.fixture(autouse=True)
def one_thread():
    """As in Ray's workers; the number of threads changes the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ray():
    """A Ray of two workers on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home directory
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.path.dirname(trials.__file__), prepend=os.pathsep)
        module = pytest.importorskip("ray", reason="needs Ray: pip install 'lorakit[ray]'")
        for attempt in range(3):
            try:
                module.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
                break
            except Exception:  # Ray gives a busy machine 30 s to start it
                module.shutdown()
                if attempt == 2:
                    raise
        yield module
        module.shutdown()


@pytest.fixture(scope="module")
def pool():
    with experiments.process_pool(2, threads=1) as executor:
        yield executor


@pytest.mark.slow
def test_a_process_pool_gives_the_same_to_the_bit(pool, data, tmp_path):
    here = experiments.rank_sweep(trials.tiny_model(), LORA, data, trials.held_out, **SWEEP)
    for source in (trials.tiny_model(), trials.tiny_model):
        there = experiments.rank_sweep(source, LORA, data, trials.held_out, executor=pool, **SWEEP)
        assert there == here
    path = tmp_path / "base"
    trials.tiny_model().save_pretrained(path)
    for executor in (None, pool):
        found = experiments.rank_sweep(str(path), LORA, data, trials.held_out, executor=executor, **SWEEP)
        assert found == here
    here = experiments.adapt_each_layer(trials.tiny_model(), LORA, data, trials.held_out, **SETTINGS)
    there = experiments.adapt_each_layer(path, LORA, data, trials.held_out, executor=pool, **SETTINGS)
    assert there == here


@pytest.mark.slow
def test_a_sweep_goes_on_elsewhere(pool, data, tmp_path):
    arguments = (LORA, data, trials.held_out)
    settings = {"records": tmp_path, **SWEEP}
    part = experiments.rank_sweep(trials.tiny_model(), *arguments, shard="2/2", **settings)
    assert list(part) == ["2 with seed 0", "2 with seed 1"]
    assert part.missing == ("without adapter", "4 with seed 0", "4 with seed 1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    rest = experiments.rank_sweep(trials.tiny_model(), *arguments, shard=(1, 2), executor=pool, **settings)
    assert rest.missing == ()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = experiments.rank_sweep(trials.tiny_model(), *arguments, **SWEEP)

    def never(model):
        raise AssertionError("nothing is left to evaluate")

    assert experiments.rank_sweep(trials.tiny_model(), LORA, data, never, **settings) == whole


class Unpicklable:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, model):
        raise AssertionError

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssertionError


def test_what_cannot_be_pickled_is_named(data, tiny_llama):
    with experiments.process_pool(1) as pool:  # starts no process

        def sweep(model=tiny_llama, examples=data, evaluate=trials.held_out, **changes):
            experiments.rank_sweep(model, LORA, examples, evaluate, executor=pool, **SWEEP | changes)

        for changes, name in (
            ({"model": Unpicklable()}, "model"),
            ({"examples": Unpicklable()}, "train_data"),
            ({"evaluate": Unpicklable()}, "evaluate"),
            ({"collate_fn": Unpicklable()}, "collate_fn"),
            ({"train": Unpicklable()}, "train"),
        ):
            with pytest.raises(
                PlanError, match=rf"`{name}` must be picklable, since other .* got Unpicklable \(.*lock"
            ):
                sweep(**{"model": trials.tiny_model} | changes)


def test_a_large_model_is_not_sent_to_each_training(data, monkeypatch):
    monkeypatch.setattr(_work, "_LARGEST", 1000)
    with (
        experiments.process_pool(1) as pool,
        pytest.raises(PlanError, match=r"`model` has [\d,.]+ ?\S* bytes, too many to be sent .* Pass a path, a Hub id"),
    ):
        experiments.rank_sweep(trials.tiny_model(), LORA, data, trials.held_out, executor=pool, **SWEEP)


def test_a_function_that_returns_no_model_is_refused(data):
    with pytest.raises(TypeError, match="`model` must return a model .* it returned int"):
        experiments.rank_sweep(lambda: 3, LORA, data, trials.held_out, **SWEEP)


def test_a_pool_shares_the_threads_and_checks_its_arguments():
    torch.set_num_threads(4)
    for workers, threads in ((1, 4), (2, 2), (3, 1), (8, 1)):
        with experiments.process_pool(workers) as pool:
            assert (pool._max_workers, pool._initargs) == (workers, (threads,))
    with pytest.raises(ValueError, match="`workers` must be a positive integer; got 0"):
        experiments.process_pool(0)
    with pytest.raises(ValueError, match="`threads` must be a positive integer; got 0"):
        experiments.process_pool(1, threads=0)


@pytest.mark.slow
def test_ray_gives_the_same_to_the_bit(ray, data, tmp_path):
    offset = 0.0

    def evaluate(model):  # functions that only this file has
        return trials.held_out(model) + offset

    here = experiments.rank_sweep(trials.tiny_model(), LORA, data, evaluate, **SWEEP)
    with experiments.RayExecutor() as executor:
        there = experiments.rank_sweep(
            trials.tiny_model(), LORA, data, evaluate, executor=executor, records=tmp_path, **SWEEP
        )
    assert there == here
    assert len(list(tmp_path.iterdir())) == 5
    assert ray.is_initialized()  # it was here before


@pytest.mark.slow
def test_ray_repeats_what_was_killed(ray, data, tmp_path):
    trials_ = [Trial(f"trial {x}", trials.squared, {"x": x}, {}) for x in range(4)]
    killed = Trial("killed", trials.killed, {"x": 7, "flag": tmp_path / "flag"}, {})
    with experiments.RayExecutor(num_cpus=1, max_retries=1) as executor:
        results = run_plan([*trials_, killed], tmp_path / "a", executor=executor, progress=False)
    assert [result["squared"] for result in results.values()] == [0, 1, 4, 9, 49]
    assert (tmp_path / "flag-0").exists()
    evaluate = trials.KillsWorker(tmp_path / "worker")
    with experiments.RayExecutor(max_retries=0) as executor, pytest.raises(TrialError) as raised:
        experiments.rank_sweep(
            trials.tiny_model(), LORA, data, evaluate, executor=executor, records=tmp_path / "b", **SWEEP
        )
    (missing,) = raised.value.missing
    assert missing in ("4 with seed 0", "4 with seed 1")
    assert str(raised.value).startswith(f"1 of 5 trials failed: '{missing}' (WorkerCrashedError: ")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").iterdir()}
    assert len(before) == 4
    with experiments.RayExecutor(max_retries=0) as executor:
        again = experiments.rank_sweep(
            trials.tiny_model(), LORA, data, evaluate, executor=executor, records=tmp_path / "b", **SWEEP
        )
    assert again == experiments.rank_sweep(trials.tiny_model(), LORA, data, trials.held_out, **SWEEP)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_the_executor_on_ray_is_an_executor(ray, tmp_path):
    executor = experiments.RayExecutor(num_cpus=2)
    assert sorted(executor.map(pow, (2, 3), (5, 2))) == [9, 32]
    failing = executor.submit(trials.unless, 3, flag=str(tmp_path / "no"))
    with pytest.raises(ValueError, match="no 3") as raised:
        failing.result(timeout=60)
    assert type(raised.value) is ValueError
    running = executor.submit(trials.slowly, 1, 600)
    waiting = executor.submit(trials.squared, 1)  # both need all CPUs
    executor.shutdown(cancel_futures=True)
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result(timeout=60)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(pow, 2, 3)
    with experiments.RayExecutor() as other:  # the CPUs of the cancelled call are free again
        assert other.submit(os.getpid).result(timeout=60) != os.getpid()


@pytest.mark.slow
def test_arguments_of_the_executor_on_ray(ray):
    for changes, message in (
        ({"num_cpus": -1}, "`num_cpus` must be a finite number that is not negative; got -1"),
        ({"num_gpus": True}, "`num_gpus` must be a finite number that is not negative; got True"),
        ({"max_retries": -1}, "`max_retries` must be a non-negative integer; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            experiments.RayExecutor(**changes)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"RayExecutor needs Ray: pip install 'lorakit\[ray\]'"):
        experiments.RayExecutor()
