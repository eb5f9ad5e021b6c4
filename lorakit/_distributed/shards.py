"""Loaders on several processes: which examples each process sees.

A loader counts as sharded if accelerate prepared it or if it has a DistributedSampler of torch. Any other loader is
assumed to give every process the same examples. Each process then computes the whole result without communication, so
one process may also run alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, SkipBatchSampler
from torch import distributed
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset

from lorakit._distributed.fsdp import is_distributed
from lorakit.errors import CalibrationError

_END = object()


@dataclass(frozen=True)
class LoaderShard:
    """The part of a sharded loader that this process sees.

    Processes take turns, example by example (`one_by_one`) or batch by batch. Positions ≥ `num_examples` are padding
    duplicates, which fill up the last batches.
    """

    loader: Any
    rank: int
    world_size: int
    batch_size: int | None  # of one process; None if only the loader's batches tell
    one_by_one: bool = False
    num_examples: float = math.inf

    def steps(self, step: Callable[[Any], tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Call `step` on each batch, in all processes together; yield the sums of its results over the processes.

        Raises: CalibrationError in all processes if one of them raised anything.
        """
        batches = iter(self.loader)
        counts: tuple[int, ...] = ()
        more = True
        while True:
            failure = None
            try:
                batch = next(batches, _END) if more else _END
            except Exception as error:
                if isinstance(self.loader, DataLoaderDispatcher):  # the others wait for a batch and cannot be told
                    raise
                failure, batch = error, _END
            more = batch is not _END
            if more:
                try:
                    counts = step(batch)
                except Exception as error:
                    failure = error
            reports = self.gather((more, counts, None if failure is None else f"{type(failure).__name__}: {failure}"))
            failures = [
                f"process {rank} raised {text}" for rank, (_, _, text) in enumerate(reports) if text is not None
            ]
            if failures:
                raise CalibrationError(
                    f"The pass failed, in all {self.world_size} processes: {'; '.join(failures)}"
                ) from failure
            if not any(more for more, _, _ in reports):
                return
            yield tuple(map(sum, zip(*(each for _, each, _ in reports if each), strict=True)))

    def check(self, sizes: Sequence[int]) -> None:
        """Raise CalibrationError if this process's batches do not have the size that the loader declares."""
        expected = self.batch_size
        if expected is not None and (sizes[-1] > expected or any(size != expected for size in sizes[-2:-1])):
            raise _unclear(f"its batches should have {expected} examples, but have {list(sizes[-2:])}")

    def places(self, sizes: Sequence[int]) -> list[int | None]:
        """The position of each of this process's examples in the unsharded loader; None for padding duplicates.

        `sizes` are the sizes of this process's batches so far.
        """
        if self.one_by_one:
            places = [i * self.world_size + self.rank for i in range(sum(sizes))]
        else:
            places, before = [], 0
            for size in sizes:
                first = before * self.world_size + self.rank * (self.batch_size or size)
                places += range(first, first + size)
                before += size
        end = self.num_examples
        if isinstance(self.loader, DataLoaderDispatcher) and self.loader.end_of_dataloader and sizes:
            end = sum(sizes[:-1]) * self.world_size + self.loader.remainder
        return [place if place < end else None for place in places]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank."""
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


def shard_of(loader: Iterable[Any]) -> LoaderShard | None:
    """How `loader` is sharded; None if every process sees all of it, or if there is only one process.

    Raises: CalibrationError if it is sharded in a way that hides which examples are padding duplicates.
    """
    if not is_distributed():
        return None
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if isinstance(loader, DataLoaderDispatcher):
        return LoaderShard(loader, rank, world_size, None) if loader.state.num_processes > 1 else None
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    shard = next((one for one in (batches, sampler) if isinstance(one, BatchSamplerShard)), None)
    if shard is not None:
        inner = shard.batch_sampler
        examples: Any = getattr(inner, "sampler", None)
        if type(inner) is not BatchSampler or isinstance(examples, DistributedSampler):
            raise _unclear("accelerate prepared it from a loader with a custom batch sampler")
        if shard.num_processes != world_size:
            raise _unclear(f"it was prepared for {shard.num_processes} processes, and there are {world_size}")
        size = inner.batch_size // world_size if shard.split_batches else inner.batch_size
        end = math.inf if inner.drop_last else len(examples)
        return LoaderShard(loader, shard.process_index, world_size, size, num_examples=end)
    sampler = getattr(batches, "sampler", sampler)
    if isinstance(sampler, DistributedSampler):
        dataset: Any = sampler.dataset
        if type(batches) is not BatchSampler or type(sampler).__iter__ is not DistributedSampler.__iter__:
            raise _unclear("its sampler or batch sampler is a custom one")
        if sampler.num_replicas != world_size:
            raise _unclear(f"its sampler is for {sampler.num_replicas} processes, and there are {world_size}")
        end = math.inf if sampler.drop_last else len(dataset)
        return LoaderShard(loader, sampler.rank, world_size, batches.batch_size, one_by_one=True, num_examples=end)
    if isinstance(loader, DataLoaderShard) and (
        isinstance(batches, SkipBatchSampler) or isinstance(loader.dataset, IterableDataset)
    ):
        raise _unclear("it skips first batches, or was prepared from an iterable dataset with dispatch_batches=False")
    return None


def from_first(value: Any, loader: Iterable[Any]) -> Any:
    """The first process's `value` if `loader` is sharded; else `value`."""
    shard = shard_of(loader)
    return value if shard is None else shard.gather(value)[0]


def _unclear(why: str) -> CalibrationError:
    return CalibrationError(
        f"`loader` gives each process a part of the examples, but which part is unclear: {why}. Give every process a "
        f"loader of all examples, or a plain DataLoader prepared by accelerate or with a DistributedSampler."
    )
