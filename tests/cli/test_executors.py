"""The options for where a plan runs."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest
import typer
from typer.testing import CliRunner

from lorakit import experiments
from lorakit.cli import _executors


def test_options():
    found = []
    app = typer.Typer()

    @app.command()
    def run(
        backend: _executors.Backend = "local", workers: _executors.Workers = None, shard: _executors.ShardOf = None
    ):
        found.append((backend, workers, shard))

    runner = CliRunner()
    assert runner.invoke(app, []).exit_code == 0
    assert runner.invoke(app, ["--backend", "ray", "--workers", "3", "--shard", "1/4"]).exit_code == 0
    assert found == [("local", None, None), ("ray", 3, "1/4")]
    assert runner.invoke(app, ["--backend", "dask"]).exit_code == 2
    assert runner.invoke(app, ["--workers", "0"]).exit_code == 2


def test_one_local_worker_is_this_process():
    for workers in (None, 1):
        with _executors.executor_of("local", workers) as executor:
            assert executor is None


def test_several_local_workers_are_a_pool():
    with _executors.executor_of("local", 3) as executor:
        assert isinstance(executor, ProcessPoolExecutor)
        assert executor._max_workers == 3
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(print)


class Recorded(Executor):
    made: list[Recorded] = []  # noqa: RUF012

    def __init__(self, **options):
        self.options, self.ended = options, []
        self.made.append(self)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.ended.append((wait, cancel_futures))


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "options"),
    [
        (None, 8, 0, {"num_cpus": 1.0, "num_gpus": 0.0}),
        (2, 8, 0, {"num_cpus": 4.0, "num_gpus": 0.0}),
        (4, 8, 2, {"num_cpus": 2.0, "num_gpus": 0.5}),
        (1, 8, 2, {"num_cpus": 8.0, "num_gpus": 2}),
    ],
)
def test_on_ray_each_worker_has_its_part_of_the_machine(workers, cpus, gpus, options, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(experiments, "RayExecutor", Recorded)
    with _executors.executor_of("ray", workers) as executor:
        assert executor.options == options
    assert executor.ended == [(True, False)]
    with pytest.raises(KeyboardInterrupt), _executors.executor_of("ray", workers):
        raise KeyboardInterrupt
    assert Recorded.made[-1].ended == [(False, True)]
