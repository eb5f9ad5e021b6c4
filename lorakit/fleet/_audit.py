"""Audit every adapter of a fleet, on any executor, so that an interrupted audit continues."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from dataclasses import replace

from tqdm.auto import tqdm

from lorakit._checks import check_integer, preview
from lorakit.errors import AdapterFileError, TrialError
from lorakit.experiments._plan import Shard, read_shard
from lorakit.fleet._duplicates import find_duplicates
from lorakit.fleet._examine import Examined, examine_all
from lorakit.fleet._families import with_families
from lorakit.fleet._find import find_adapters
from lorakit.fleet._report import FleetReport
from lorakit.fleet._rows import broken

_LEAST_NEAR = 0.9
Path = str | os.PathLike[str]


def audit(
    adapters: Path | Iterable[Path],
    *,
    recursive: bool = False,
    executor: Executor | None = None,
    shard: Shard | None = None,
    cache: Path | None = None,
    near: float = 0.99,
    chunk: int = 16,
    progress: bool = True,
) -> FleetReport:
    """Audit all adapters below a directory, or of a list: a row each, families, outliers and duplicates.

    An adapter that cannot be read is a row with its error, and the audit goes on. Each adapter is audited as
    `lorakit.lens.audit` does, and checked for all servers that `lorakit.serving.PROFILES` has. Memory holds one batch
    of modules at a time, and some 3 kB for each adapter.

    Args:
        adapters: a directory, or a list of directories, .safetensors or .bin files, and Hub ids. In a directory, the
            adapters are itself and its children that have an adapter's config or weights. Hidden directories are left
            out, links are followed, and a directory with several paths counts once.
        recursive: all directories below, not the children alone.
        executor: any `concurrent.futures.Executor`, such as `lorakit.experiments.process_pool(2)` or a RayExecutor,
            whose workers see the same files. None: this process.
        shard: (i, n) or "i/n": only each n-th adapter from the i-th on, in the order of their paths. With a common
            `cache`, a call without `shard` then joins the shards.
        cache: a directory of records by the SHA-256 of the files. What has a record is not read again. A file in which
            path, inode, size and time of change are the same as before is not hashed again either.
        near: adapters whose updates have at least this cosine are near duplicates; from 0.9 to 1.
        chunk: how many adapters an executor's worker gets at a time.
        progress: show a progress bar on stderr.
    Raises: AdapterFileError if there is no such directory, or no adapter in it; PlanError for an invalid `shard`;
        ValueError for an invalid `near` or `chunk`; OSError if the cache cannot be written; TrialError if an executor's
        worker dies: the same call with the same `cache` then continues.

    Example:
        >>> import lorakit
        >>> lorakit.fleet.audit("adapters/", recursive=True).has_errors  # doctest: +SKIP
        False
    """
    if isinstance(near, bool) or not isinstance(near, int | float) or not _LEAST_NEAR <= near <= 1:
        raise ValueError(f"`near` must be a number in [{_LEAST_NEAR}, 1]; got {near!r}.")
    check_integer("chunk", chunk)
    number, count = (1, 1) if shard is None else read_shard(shard)
    directory, found = _adapters(adapters, recursive)
    found = found[number - 1 :: count]
    records = None if cache is None else os.path.abspath(os.fspath(cache))  # workers may have another directory
    if records is not None:
        os.makedirs(records, exist_ok=True)
    examined: dict[str, Examined] = {path: Examined(broken(path, error)) for path, error in found if error is not None}
    todo = [path for path, error in found if error is None]
    with tqdm(total=len(todo), desc="fleet", unit="adapter", delay=1.0, disable=not progress) as bar:
        for part in _run(todo, records, executor, chunk if executor is not None else 1):
            examined |= {each.row.path: each for each in part}
            bar.update(len(part))
    everything = [examined[path] for path, _ in found]
    groups = find_duplicates(everything, near, records)
    first = {each.path: group.path for group in groups for each in group.duplicates}
    rows = [replace(each.row, duplicate_of=first.get(each.row.path)) for each in everything]
    return FleetReport(
        directory=directory,
        shard=None if shard is None else f"{number}/{count}",
        near=float(near),
        adapters=with_families(rows),
        duplicates=groups,
    )


def _adapters(adapters: Path | Iterable[Path], recursive: bool) -> tuple[str | None, list[tuple[str, OSError | None]]]:
    """The directory, or None for a list, and the adapters' paths. Raises: AdapterFileError."""
    if not isinstance(adapters, str | os.PathLike):
        paths = list(dict.fromkeys(os.fspath(adapter) for adapter in adapters))
        if not paths:
            raise AdapterFileError("`adapters` must be a directory, or name at least one adapter; got an empty list.")
        return None, [(path, None) for path in paths]
    directory = os.fspath(adapters)
    if not os.path.isdir(directory):
        raise AdapterFileError(
            f"`adapters` must be a directory, or a list of directories, files and Hub ids; {directory!r} is no "
            "directory. Pass a single adapter in a list."
        )
    found = list(find_adapters(directory, recursive=recursive))
    if not found:
        way = "" if recursive else " Look further below with `recursive` (`--recursive`)."
        raise AdapterFileError(f"There is no adapter in {directory!r}.{way}")
    return directory, found


def _run(paths: Sequence[str], cache: str | None, executor: Executor | None, chunk: int) -> Iterator[list[Examined]]:
    parts = [list(paths[start : start + chunk]) for start in range(0, len(paths), chunk)]
    if executor is None:
        for part in parts:
            yield examine_all(part, cache)
        return
    futures: dict[Future[list[Examined]], list[str]] = {}
    try:
        for part in parts:
            futures[executor.submit(examine_all, part, cache)] = part
        for future in as_completed(list(futures)):
            yield future.result()
            del futures[future]  # with its result
    except BrokenExecutor as error:
        lost = [path for part in futures.values() for path in part]
        raise TrialError(
            f"A worker died, and the executor with it ({type(error).__name__}). {len(lost)} adapters are missing, such "
            f"as {preview(lost)}. Make a new executor, and call again with the same `cache`: what is recorded is not "
            f"read again.",
            missing=tuple(lost),
        ) from error
    finally:
        for future in futures:
            future.cancel()
