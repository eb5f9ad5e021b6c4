"""Several adapters combined into one (`add_weighted_adapter`), each module with its own rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorakit.naming.patterns import alpha_of


@dataclass(frozen=True)
class Combination:
    """The adapters that become a new one, and how.

    PEFT gives the new adapter one rank, in its layers and in its config, and then tensors of other ranks: what comes
    of that cannot be loaded, or fails half-way.
    """

    tuner: str
    adapters: list[str]
    type: str

    def complete(self, config: Any, model: nn.Module) -> None:
        """Write the ranks of the combination into its config, whose `r` is PEFT's; its scaling is 1 everywhere."""
        config.lora_alpha = alpha_of(1, config.r, 1, config.use_rslora)
        config.init_lora_weights = True  # other ways may change the base weights
        config.rank_pattern = self._ranks(model, config.r)
        config.alpha_pattern = {
            key: alpha_of(1, rank, 1, config.use_rslora) for key, rank in config.rank_pattern.items()
        }

    def check(self, model: nn.Module, configs: Mapping[str, Any]) -> None:
        """Raise ValueError where PEFT's arithmetic would fail half-way, or would give something else."""
        for adapter in self.adapters:
            config = configs.get(adapter)
            lost = [flag for flag in ("use_dora", "lora_bias") if getattr(config, flag, False)]
            if lost:
                raise ValueError(
                    f"{self.tuner} does not support a weighted combination that loses what `{lost[0]}` adds to adapter "
                    f"{adapter!r}. Merge the adapters into the base model, with merge_and_unload(adapter_names=…)."
                )
        for name, layer, ranks in self._layers(model):
            base = layer.get_base_layer()
            if self.type == "cat" or self.type.endswith("svd"):
                if getattr(base, "groups", 1) > 1:
                    raise ValueError(
                        f"{self.tuner} does not support combination_type={self.type!r} for the grouped convolution "
                        f"{name!r}; use 'linear', with adapters of equal ranks."
                    )
                if self.type != "cat" and isinstance(base, nn.Conv1d | nn.Conv3d):
                    raise ValueError(
                        f"{self.tuner} does not support combination_type={self.type!r} for Conv1d or Conv3d, which "
                        f"{name!r} is. Use 'cat'."
                    )
            elif len(set(ranks)) > 1:
                raise ValueError(
                    f"{self.tuner} does not support combination_type={self.type!r} between different ranks: it adds A "
                    f"to A and B to B. All adapters must have the same r value in each module, but they have {ranks} "
                    f"in {name!r}. Use 'cat', or a type that ends in 'svd'."
                )

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, LoraLayer, list[int]]]:
        """The layers that have any of the adapters, with their ranks there."""
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and (ranks := [layer.r[a] for a in self.adapters if a in layer.r]):
                yield name, layer, ranks

    def _ranks(self, model: nn.Module, svd_rank: int) -> dict[str, int]:
        """The rank of the combination in each module; keyed by patterns that match the full names alone."""
        combined = {}
        for name, layer, ranks in self._layers(model):
            rank = sum(ranks) if self.type == "cat" else max(ranks)
            if self.type.endswith("svd"):
                rank = svd_rank
                if isinstance(layer.get_base_layer(), nn.Conv2d):  # whose kernels PEFT cannot fill up with zeros
                    A, B = _factors(layer, next(adapter for adapter in self.adapters if adapter in layer.r))
                    rank = min(svd_rank, A.numel() // A.shape[0], B.numel() // A.shape[0])
            if ".base_layer." not in name:  # the output projection of an attention layer goes by its name
                combined["^" + re.escape(name)] = rank
        return combined


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
