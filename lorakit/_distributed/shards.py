"""Several processes: which part of a loader's examples each of them sees.

A loader counts as shared out only where it says so itself: accelerate prepared it, or it has torch's
DistributedSampler. Any other loader is taken to give every process the same examples; each then computes the whole
result by itself and waits for no other, so that a single process may also do so alone.
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
    """The part of a loader's examples that this process sees.

    Examples are dealt out to the processes in turn: one by one, or in batches. Those from `num_examples` on are
    earlier ones over again, with which the last batches were filled up.
    """

    loader: Any
    rank: int
    world_size: int
    batch_size: int | None  # of each process's batches, where it is known before
    one_by_one: bool = False
    num_examples: float = math.inf

    def steps(self, step: Callable[[Any], int]) -> Iterator[int]:
        """Do `step` for each batch, all processes together: what each yields is the sum of what `step` gave in all.

        Raises: CalibrationError in all processes where anything was raised in one of them.
        """
        batches = iter(self.loader)
        used = 0
        more = True
        while True:
            failure = None
            try:
                batch = next(batches, _END) if more else _END
            except Exception as error:
                if isinstance(self.loader, DataLoaderDispatcher):  # where the others wait for a batch, out of reach
                    raise
                failure, batch = error, _END
            more = batch is not _END
            if more:
                try:
                    used = step(batch)
                except Exception as error:
                    failure = error
            reports = self.gather((more, used, None if failure is None else f"{type(failure).__name__}: {failure}"))
            failures = {rank: said for rank, (_, _, said) in enumerate(reports) if said is not None}
            if failures:
                told = "; ".join(f"process {rank} raised {said}" for rank, said in failures.items())
                raise CalibrationError(f"The pass failed, in all {self.world_size} processes: {told}") from failure
            if not any(more for more, _, _ in reports):
                return
            yield sum(used for _, used, _ in reports)

    def check(self, sizes: Sequence[int]) -> None:
        """Raise CalibrationError where the sizes of this process's batches are not what the loader said."""
        expected = self.batch_size
        if expected is not None and (sizes[-1] > expected or any(size != expected for size in sizes[-2:-1])):
            raise _unclear(f"its batches are to have {expected} examples, but came with {list(sizes[-2:])}")

    def places(self, sizes: Sequence[int]) -> list[int | None]:
        """Where each example of this process's batches, of `sizes`, stands in the order that one process would see.

        None where it is an earlier one over again.
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
        """The `value` of each process, in their order."""
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


def shard_of(loader: Iterable[Any]) -> LoaderShard | None:
    """How `loader` is shared out; None where every process sees all of it, or there is only one.

    Raises: CalibrationError for one that is shared out in a way in which repeated examples cannot be told.
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
            raise _unclear("it was prepared from a loader with a batch sampler of its own kind")
        if shard.num_processes != world_size:
            raise _unclear(f"it is prepared for {shard.num_processes} of {world_size} processes")
        size = inner.batch_size // world_size if shard.split_batches else inner.batch_size
        end = math.inf if inner.drop_last else len(examples)
        return LoaderShard(loader, shard.process_index, world_size, size, num_examples=end)
    sampler = getattr(batches, "sampler", sampler)
    if isinstance(sampler, DistributedSampler):
        dataset: Any = sampler.dataset
        if type(batches) is not BatchSampler or type(sampler).__iter__ is not DistributedSampler.__iter__:
            raise _unclear("its sampler or batch sampler is of its own kind")
        if sampler.num_replicas != world_size:
            raise _unclear(f"its sampler is for {sampler.num_replicas} of {world_size} processes")
        end = math.inf if sampler.drop_last else len(dataset)
        return LoaderShard(loader, sampler.rank, world_size, batches.batch_size, one_by_one=True, num_examples=end)
    if isinstance(loader, DataLoaderShard) and (
        isinstance(batches, SkipBatchSampler) or isinstance(loader.dataset, IterableDataset)
    ):
        raise _unclear("it was prepared with first batches skipped, or from an iterable with dispatch_batches=False")
    return None


def from_first(value: Any, loader: Iterable[Any]) -> Any:
    """The first process's `value` where `loader` is shared out among several; else `value`."""
    share = shard_of(loader)
    return value if share is None else share.gather(value)[0]


def _unclear(why: str) -> CalibrationError:
    return CalibrationError(
        f"`calib_loader` gives each process a part of the examples, but which part is unclear: {why}. Pass every "
        f"process a loader of all examples, or a plain DataLoader prepared by accelerate or with a DistributedSampler."
    )
