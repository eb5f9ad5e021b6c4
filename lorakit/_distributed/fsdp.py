"""Several processes: models whose weights each process has a part of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lorakit.errors import CalibrationError


def is_distributed() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel.

    Raises: CalibrationError where the model is wrapped by FullyShardedDataParallel (FSDP1), whose weights are only
    there within its own forward passes.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if not is_distributed():
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, nn.Module) and any(isinstance(one, FullyShardedDataParallel) for one in model.modules()):
        raise CalibrationError(
            "The model's weights are sharded by FullyShardedDataParallel (FSDP1). Gather them first: save the adapter "
            "from a full state dict and load it into an unsharded model; or shard with fully_shard (FSDP2)."
        )
    return model


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have every process hold all weights of a model sharded by fully_shard (FSDP2), until the block ends.

    Forward and backward passes then wait for no other process, so that one may run more of them than another, or fail.
    """
    if not is_distributed():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _parameter_groups(module)]
    settings = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        yield
    except BaseException:
        for module in modules:
            if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()  # or a pass that failed half-way would leave torch in the midst of it
        raise
    finally:
        for group, mesh_info, after_backward in settings:
            group.post_forward_mesh_info = mesh_info
            group.reshard_after_backward = after_backward
        for module in modules:
            module.reshard()


def _parameter_groups(module: Any) -> list[Any]:
    # torch can set whether weights are kept after a pass, but does not say what was set before.
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is sharded among processes (a DTensor), gathered; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def gram(matrices: Sequence[Tensor], long: int) -> Tensor:
    """The Gram matrices (n, r, r), in float64, of n matrices of one shape and sharding, summed over dimension `long`.

    Where every process has some of the rows that are summed over, r × r sums are all that is exchanged; where it has
    some of the r others, the matrices are gathered.
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
    """Copy `value` into `tensor`, of a sharded one each process its part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        value = distribute_tensor(value.to(tensor.dtype), sharded.device_mesh, sharded.placements)
    tensor.copy_(value)
