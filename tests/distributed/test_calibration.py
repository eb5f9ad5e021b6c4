"""Sensitivity and surgery on two processes: each gets what one process gets from the whole loader.

The checks are in `calibration.py`.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here"),
]


@pytest.fixture(scope="module")
def outcome(launch):
    return launch("calibration")


@pytest.mark.parametrize("kind", ["sampler", "shard", "shard-split", "shard-uneven", "dispatcher", "dispatcher-stream"])
def test_a_sharded_loader_gives_what_one_process_gets(outcome, kind):
    assert outcome(f"loader-{kind}") == ["ok", "ok"]


@pytest.mark.parametrize("check", ["no-repeats", "nothing-for-one", "one-at-a-time"])
def test_uneven_shards(outcome, check):
    assert outcome(check) == ["ok", "ok"]


@pytest.mark.parametrize("check", ["ddp-smooth_abs", "ddp-grad_direction", "accelerate"])
def test_surgery_under_ddp(outcome, check):
    assert outcome(check) == ["ok", "ok"]


@pytest.mark.parametrize("check", ["fsdp2-hadamard", "fsdp2-svd", "fsdp2-fisherlora", "fsdp2-accelerate", "fsdp2-save"])
def test_surgery_under_fsdp2(outcome, check):
    assert outcome(check) == ["ok", "ok"]


@pytest.mark.parametrize("check", ["fisher-ddp", "fisher-fsdp2"])
def test_the_fisher_probe(outcome, check):
    assert outcome(check) == ["ok", "ok"]


def test_if_one_process_fails_all_do(outcome):
    assert outcome("failing-process") == ["ok", "ok"]


@pytest.mark.parametrize("check", ["no-data", "endless", "unclear-loaders", "fsdp1"])
def test_what_is_refused(outcome, check):
    assert outcome(check) == ["ok", "ok"]


def test_a_process_may_work_alone(outcome):
    assert outcome("one-process-alone") == ["ok", "ok"]
