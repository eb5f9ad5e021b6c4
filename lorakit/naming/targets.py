"""The modules that an adapter targets when its config names none."""

from __future__ import annotations

import warnings

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import UnsupportedModelError
from lorakit.naming.roles import role_of


def default_targets(model: nn.Module) -> set[str]:
    """The last name components of the model's query and value projections.

    Raises: UnsupportedModelError (a ValueError) where there are none, or where they are fused with others.
    """
    roles = {
        name: role_of(name)
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or hasattr(module, "in_features")
    }
    by_role = {role: [name for name in roles if roles[name] == role] for role in ("query", "value", "fused_qkv")}
    targets = {name.rpartition(".")[2] for role in ("query", "value") for name in by_role[role]}
    fused = by_role["fused_qkv"]
    if by_role["query"] and by_role["value"]:
        if fused:
            warnings.warn(
                f"FisherLoRA: `target_modules` was not given; {sorted(targets)} are adapted, but {fused[0]!r} and "
                f"{len(fused) - 1} more modules, which fuse query, key and value, are not.",
                stacklevel=2,
            )
        return targets
    if fused:
        raise UnsupportedModelError(
            f"FisherLoRA gives query and value projections different ranks, but this model fuses them: {fused[0]!r} "
            f"(and {len(fused) - 1} more) computes all three in one matrix. Please specify `target_modules`, "
            f"for instance target_modules=[{fused[0].rpartition('.')[2]!r}], which then takes rank `r`."
        )
    linear = sorted({name.rpartition(".")[2] for name in roles})
    raise UnsupportedModelError(
        f"FisherLoRA found no query and value projections by name in {type(model).__name__}. Please specify "
        f"`target_modules`; its linear modules are named {linear}."
    )
