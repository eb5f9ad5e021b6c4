"""The factors of an adapter in training, on their devices, sharded over processes or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit._distributed.fsdp import full_tensor, gram, is_sharded
from lorakit.adapters.experts import expert_name, unstacked
from lorakit.adapters.in_model import LiveModule, read_weight
from lorakit.errors import UnsupportedModelError
from lorakit.naming.roles import Role, layer_of

_BATCH = 1 << 20  # entries of stacked factors; larger stacks are no faster on a CPU
_BATCH_ELSEWHERE = 1 << 26


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = scaling · B A of one module, or of one expert: B (d_out, r) and A (r, d_in), detached.

    Either may be sharded, unless it is an expert's.
    """

    module: LiveModule
    B: Tensor
    A: Tensor
    expert: int | None = None

    @property
    def name(self) -> str:
        return self.module.name if self.expert is None else expert_name(self.module.name, self.expert)

    @property
    def role(self) -> Role | None:
        return self.module.role

    @property
    def layer(self) -> int | None:
        return layer_of(self.module.name)

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def sharded(self) -> bool:
        return is_sharded(self.B) or is_sharded(self.A)


def factors_of(module: LiveModule) -> list[Factors]:
    """A module's factors, or those of each expert of a stack; none for grouped convolutions.

    Raises: UnsupportedModelError for weights that DeepSpeed ZeRO-3 has partitioned.
    """
    layer, name = module.layer, module.adapter_name
    if module.experts is not None:
        B, A = (full_tensor(_weight(half, module.name)) for half in (module.up, module.down))
        pairs = zip(*unstacked(B, A, module.experts), strict=True)
        return [Factors(module, B, A, expert) for expert, (B, A) in enumerate(pairs)]
    if name in layer.lora_embedding_A:
        B, A = layer.lora_embedding_B[name].detach(), layer.lora_embedding_A[name].detach()
    else:
        B, A = _weight(module.up, module.name), _weight(module.down, module.name)
    if A.ndim > 2 and not (is_sharded(B) or is_sharded(A)):
        B, A = B.flatten(1), A.flatten(1)
    return [Factors(module, B, A)] if B.ndim == 2 and B.shape[1] == A.shape[0] else []


def _weight(module: Any, name: str) -> Tensor:
    weight: Tensor = module.weight
    if hasattr(weight, "ds_id") and not weight.numel():
        raise UnsupportedModelError(
            f"{name!r} is partitioned by DeepSpeed ZeRO-3, which gathers weights only during its own passes. Use "
            f"ZeRO-2 or fully_shard (FSDP2), or audit saved checkpoints with lorakit.lens.audit."
        )
    return read_weight(module) if weight.is_meta else weight.detach()


def batches(factors: Sequence[Factors]) -> Iterator[list[Factors]]:
    """Batches that can be stacked: equal shapes, dtypes, devices and sharding."""
    groups: dict[Any, list[Factors]] = {}
    for one in factors:
        kinds = [(x.shape, x.dtype, x.device, _sharding(x)) for x in (one.B, one.A)]
        groups.setdefault(tuple(kinds), []).append(one)
    for group in groups.values():
        entries = group[0].B.numel() + group[0].A.numel()
        step = max(1, (_BATCH if group[0].B.device.type == "cpu" else _BATCH_ELSEWHERE) // entries)
        yield from (group[start : start + step] for start in range(0, len(group), step))


def _sharding(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def scalings(batch: Sequence[Factors]) -> Tensor:
    """Scalings (n,), float64, on the factors' device."""
    return torch.tensor([one.module.scaling for one in batch], dtype=torch.float64, device=batch[0].B.device)


def grams(batch: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """BᵀB and A Aᵀ (n, r, r), float64, unsharded. If the factors are sharded, all processes must call this together."""
    return gram([one.B for one in batch], 0), gram([one.A for one in batch], 1)
