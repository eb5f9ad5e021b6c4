"""Models on several processes, whose weights may be sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lorakit._distributed import _private
from lorakit._signals import restoring
from lorakit.errors import CalibrationError


def is_distributed() -> bool:
    """Whether torch.distributed runs more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def unwrapped(model: Any) -> Any:
    """`model` without a DistributedDataParallel wrapper.

    Raises: CalibrationError if the model uses FullyShardedDataParallel (FSDP1), which holds full weights only during
    its own forward passes.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if not is_distributed():
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, nn.Module) and any(isinstance(one, FullyShardedDataParallel) for one in model.modules()):
        raise CalibrationError(
            "The model's weights are sharded by FullyShardedDataParallel (FSDP1), which is not supported. Save the "
            "adapter from a full state dict and load it into an unsharded model, or shard with fully_shard (FSDP2)."
        )
    return model


@restoring
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a model sharded by fully_shard (FSDP2) in every process while the block runs.

    Forward and backward passes then need no communication, so one process may run more of them than another, or fail.
    """
    if not is_distributed():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _private.parameter_groups(module)]
    settings = [(group, _private.resharding(group)) for group in groups]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        yield
    except BaseException:
        for module in modules:
            if _private.is_root(module) and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()  # the pass may have failed between forward and backward
        raise
    finally:
        for group, setting in settings:
            _private.set_resharding(group, setting)
        for module in modules:
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor (DTensor) gathered from all processes; any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which this process holds a part."""
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def gram(matrices: Sequence[Tensor], long: int) -> Tensor:
    """Gram matrices (n, r, r), in float64, of n matrices of equal shape and sharding, summed over dimension `long`.

    If the matrices are sharded along `long`, only r × r sums are exchanged. Otherwise the matrices are gathered.
    """
    first: Any = matrices[0]
    parts: list[Any] = list(matrices)
    summed = False
    if is_sharded(first):
        summed = all(placement.is_replicate() or placement.is_shard(long) for placement in first.placements)
        parts = [part.to_local() if summed else full_tensor(part) for part in parts]
    rows = torch.stack(parts).double()
    rows = rows if long == 0 else rows.mT
    sums = rows.mT @ rows
    if not summed:
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    kinds = [Partial() if placement.is_shard() else Replicate() for placement in first.placements]
    return DTensor.from_local(sums, first.device_mesh, kinds, run_check=False).full_tensor()


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy `value` into `tensor`; each process copies its own part of a sharded tensor."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        value = distribute_tensor(value.to(tensor.dtype), sharded.device_mesh, sharded.placements)
    tensor.copy_(value)
