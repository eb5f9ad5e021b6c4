"""The private names of torch that lorakit reads for models sharded by fully_shard (FSDP2), one function each."""

from __future__ import annotations

from typing import Any


def parameter_groups(module: Any) -> list[Any]:
    """The groups of parameters that an FSDPModule gathers and frees together."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def is_root(module: Any) -> bool:
    """Whether an FSDPModule is the outermost one. torch knows it from the first forward pass on."""
    return bool(module._get_fsdp_state()._is_root)


def resharding(group: Any) -> tuple[Any, bool]:
    """Whether a group's weights are freed after forward and after backward, for which torch has no getter."""
    return group.post_forward_mesh_info, group.reshard_after_backward


def set_resharding(group: Any, settings: tuple[Any, bool]) -> None:
    """Restore what `resharding` returned."""
    group.post_forward_mesh_info, group.reshard_after_backward = settings
