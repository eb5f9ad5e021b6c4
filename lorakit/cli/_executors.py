"""Where commands run a plan: the options that all of them have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Annotated, Literal

import typer

from lorakit import experiments

Backend = Annotated[Literal["local", "ray"], typer.Option(help="Run on this machine, or on Ray (extra ray).")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Trainings at a time on this machine. Default: 1 (local), or one for each CPU (ray).",
        show_default=False,
    ),
]
ShardOf = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Run only each N-th training, from the I-th on.", show_default=False),
]


@contextlib.contextmanager
def executor_of(backend: Literal["local", "ray"], workers: int | None) -> Iterator[Executor | None]:
    """The executor of these options; None is this process, one training after the other.

    On Ray, each training asks for an equal part of this machine's CPUs and GPUs, so that `workers` of them run at a
    time. A Ctrl-C cancels what has not started. Raises: MissingExtraError.
    """
    executor: Executor | None = None
    if backend == "ray":
        import torch

        parts = workers or os.cpu_count() or 1
        gpus = torch.cuda.device_count() / parts
        executor = experiments.RayExecutor(
            num_cpus=(os.cpu_count() or 1) / parts, num_gpus=gpus if gpus < 1 else int(gpus)
        )
    elif workers is not None and workers > 1:
        executor = experiments.process_pool(workers)
    try:
        yield executor
    except BaseException:
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        raise
    if executor is not None:
        executor.shutdown()
