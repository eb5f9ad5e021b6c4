"""Where a plan's trials can run: in other processes of this machine, or on Ray."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from lorakit._checks import check_integer
from lorakit.errors import MissingExtraError

T = TypeVar("T")


def process_pool(workers: int, *, threads: int | None = None) -> ProcessPoolExecutor:
    """A ProcessPoolExecutor of fresh interpreters, in which torch is safe, unlike in forks.

    `threads`: of torch in each worker; by default this process's, shared among the workers. Workers end with this
    process, also if it is killed. They import the script that started them, so it must call this below
    ``if __name__ == "__main__":``. Raises: ValueError unless both are positive integers.
    """
    check_integer("workers", workers)
    if threads is None:
        threads = max(1, torch.get_num_threads() // workers)
    check_integer("threads", threads)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads,))


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class RayExecutor(Executor):
    """A `concurrent.futures.Executor` that runs each call as a task of Ray. Needs the extra `ray`.

    Args:
        num_cpus, num_gpus: what each call needs. Ray runs as many at a time as the machine or the cluster has.
        address: of a running cluster, or "auto". None: the Ray that this process has started or joined already, else
            the cluster in the environment variable RAY_ADDRESS, else one that runs on this machine, else a new one
            here, which `shutdown` stops.
        max_retries: how often a call is repeated whose worker was killed. Calls that raise are not repeated.

    Raises: MissingExtraError without Ray; ValueError for invalid resources. What Ray raises is passed on.
    """

    def __init__(
        self, *, num_cpus: float = 1, num_gpus: float = 0, address: str | None = None, max_retries: int = 2
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("RayExecutor needs Ray: pip install 'lorakit[ray]'.") from error
        for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number that is not negative; got {value!r}.")
        check_integer("max_retries", max_retries, least=0)
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._call: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=max_retries)(_call)
        self._pending: set[Future[Any]] = set()
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        reference = self._call.remote(fn, args, kwargs)
        future: Future[T] = Future()

        def settle(done: Future[T]) -> None:
            if future.cancelled():
                return
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:  # Ray wraps what a call raised
                future.set_exception(getattr(error, "cause", None) or error)

        def forget(done: Future[T]) -> None:
            self._pending.discard(done)
            if done.cancelled():
                done.set_running_or_notify_cancel()  # for those who wait for it
                # With its worker: an interrupt may be lost in an import. What a trial writes is whole or not there.
                self._ray.cancel(reference, force=True)

        self._pending.add(future)
        future.add_done_callback(forget)
        reference.future().add_done_callback(settle)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        pending = list(self._pending)
        if cancel_futures:
            for future in pending:
                future.cancel()
        if wait:
            futures.wait(pending)
            if self._started:
                self._ray.shutdown()
                self._started = False


def _call(function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return function(*args, **kwargs)
