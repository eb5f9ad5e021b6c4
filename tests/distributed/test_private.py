"""torch's private names for FSDP2; a failure here says which version of torch changed them."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from lorakit._distributed import _private

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")
CHANGED = f"torch {torch.__version__} keeps the state of fully_shard elsewhere"


@pytest.fixture
def model():
    """A model of one process, sharded by fully_shard, whose inner layer keeps its weights after forward."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        fully_shard(made[0], mesh=mesh, reshard_after_forward=False)
        yield fully_shard(made, mesh=mesh)
    finally:
        distributed.destroy_process_group()


def test_groups_and_roots(model):
    assert len(_private.parameter_groups(model)) == len(_private.parameter_groups(model[0])) == 1, CHANGED
    model(torch.ones(2, 3))
    assert _private.is_root(model), CHANGED
    assert not _private.is_root(model[0]), CHANGED


def test_what_was_set_can_be_read_and_restored(model):
    (group,) = _private.parameter_groups(model[0])
    before = _private.resharding(group)
    assert before == (None, True), CHANGED
    model[0].set_reshard_after_forward(True)
    model[0].set_reshard_after_backward(False)
    after_forward, after_backward = _private.resharding(group)
    assert after_forward is not None, CHANGED
    assert after_backward is False, CHANGED
    _private.set_resharding(group, before)
    assert _private.resharding(group) == before
