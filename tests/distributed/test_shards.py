"""The positions of each process's examples, against the indices that the samplers themselves yield."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from lorakit._distributed import fsdp, shards
from lorakit._distributed.shards import shard_of


def places_of_all(loader_of_rank, world_size):
    """Pairs of a position and the index that the sampler yields there, over all processes."""
    found = []
    for rank in range(world_size):
        loader = loader_of_rank(rank)
        processes = SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_rank=lambda rank=rank: rank,
            get_world_size=lambda: world_size,
        )
        with mock.patch.object(fsdp, "distributed", processes), mock.patch.object(shards, "distributed", processes):
            shard = shard_of(loader)
        batches = list(loader.batch_sampler)
        sizes = []
        for batch in batches:
            sizes.append(len(batch))
            shard.check(sizes)
        found += zip(shard.places(sizes), [index for batch in batches for index in batch], strict=True)
    return found


sizes = {"n": st.integers(1, 40), "batch_size": st.integers(1, 7), "world_size": st.integers(2, 5)}


@pytest.mark.parametrize("kind", ["sampler", "shard", "split", "uneven", "split-uneven"])
@given(**sizes)
def test_every_example_counts_once_at_its_own_position(kind, n, batch_size, world_size):
    examples = range(n)

    def loader_of_rank(rank):
        if kind == "sampler":
            sampler = DistributedSampler(examples, world_size, rank, shuffle=False)
            return SimpleNamespace(sampler=sampler, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False))
        split = kind.startswith("split")
        inner = BatchSampler(SequentialSampler(examples), batch_size * (world_size if split else 1), drop_last=False)
        shard = BatchSamplerShard(
            inner, world_size, rank, split_batches=split, even_batches=not kind.endswith("uneven")
        )
        return SimpleNamespace(sampler=None, batch_sampler=shard)

    found = places_of_all(loader_of_rank, world_size)
    counted = [(place, index) for place, index in found if place is not None]
    assert sorted(counted) == [(i, i) for i in examples]


@given(**sizes)
def test_with_drop_last_only_whole_rounds_count(n, batch_size, world_size):
    def loader_of_rank(rank):
        sampler = DistributedSampler(range(n), world_size, rank, shuffle=False, drop_last=True)
        return SimpleNamespace(sampler=sampler, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False))

    if n >= world_size:
        whole_rounds = n // world_size * world_size
        assert sorted(places_of_all(loader_of_rank, world_size)) == [(i, i) for i in range(whole_rounds)]
