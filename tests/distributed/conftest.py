"""Launches a worker file in two gloo processes on the CPU and reads the outcome of each of its checks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WORLD_SIZE = 2


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[[str], list[str]]]:
    """Runs a worker file; returns a function from a check's name to its outcome in each process."""
    return lambda worker, **options: _launch(worker, tmp_path_factory.mktemp(worker), **options)


def _launch(worker: str, directory: Path, *, timeout: float = 240) -> Callable[[str], list[str]]:
    """From a check's name to one outcome a process: "ok", or what went wrong.

    Nothing can hang: after `timeout` seconds, or 20 seconds after a process has failed, all processes are killed. Checks
    without an outcome then get what the process printed.
    """
    here = Path(__file__).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [directory / f"{worker}-{rank}.log" for rank in range(WORLD_SIZE)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")]),
        }
        with log.open("w") as output:
            command = [sys.executable, "-W", "ignore", str(here / f"{worker}.py"), str(directory)]
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                end = min(end, time.monotonic() + 20)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = []
    for rank, process in enumerate(processes):
        file = directory / f"{worker}-{rank}.json"
        outcomes = json.loads(file.read_text()) if file.exists() else {}
        printed = f"exit code {process.returncode}\n{logs[rank].read_text()[-4000:]}"
        found.append((outcomes, printed))
    return lambda name: [outcomes.get(name, f"not run, or not finished: {printed}") for outcomes, printed in found]
