"""The modules that FisherLoRA and the Fisher probe target by default."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lorakit.errors import UnsupportedModelError
from lorakit.naming.roles import role_of

if TYPE_CHECKING:
    from torch import nn


def default_targets(model: nn.Module) -> set[str]:
    """The last name components of the model's query and value projections, such as {"q_proj", "v_proj"}.

    Raises: UnsupportedModelError (a ValueError) if the model has none, or only fused ones.
    """
    from transformers.pytorch_utils import Conv1D

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
                f"FisherLoRA: `target_modules` was not given, so {sorted(targets)} are adapted, but {fused[0]!r} and "
                f"{len(fused) - 1} more modules that fuse query, key and value are not.",
                stacklevel=2,
            )
        return targets
    if fused:
        raise UnsupportedModelError(
            f"FisherLoRA gives query and value projections different ranks, but this model fuses them: {fused[0]!r} "
            f"(and {len(fused) - 1} more) computes query, key and value in one matrix. Give `target_modules`, for "
            f"instance target_modules=[{fused[0].rpartition('.')[2]!r}], which then has rank `r`."
        )
    linear = sorted({name.rpartition(".")[2] for name in roles})
    raise UnsupportedModelError(
        f"FisherLoRA found no query and value projections by name in {type(model).__name__}. Give `target_modules`; "
        f"the model's linear modules are named {linear}."
    )
