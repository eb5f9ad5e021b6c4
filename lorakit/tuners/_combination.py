"""The checks and ranks behind `add_weighted_adapter`, where each module has its own rank."""

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
    """Which adapters are combined, and by which `combination_type`.

    PEFT records one rank for the new adapter, but its tensors may have other ranks: such an adapter cannot be loaded,
    or the combination fails halfway. So this class writes the true ranks into the config and refuses what would fail.
    """

    tuner: str
    adapters: list[str]
    type: str

    def complete(self, config: Any, model: nn.Module) -> None:
        """Write the rank of every module into the new adapter's config. Its scaling is 1 everywhere."""
        config.lora_alpha = alpha_of(1, config.r, 1, config.use_rslora)
        config.init_lora_weights = True  # other initializations may change the base weights
        config.rank_pattern = self._ranks(model, config.r)
        config.alpha_pattern = {
            key: alpha_of(1, rank, 1, config.use_rslora) for key, rank in config.rank_pattern.items()
        }

    def check(self, model: nn.Module, configs: Mapping[str, Any]) -> None:
        """Raise ValueError where PEFT would fail halfway or compute something else."""
        for adapter in self.adapters:
            config = configs.get(adapter)
            lost = [flag for flag in ("use_dora", "lora_bias") if getattr(config, flag, False)]
            if lost:
                raise ValueError(
                    f"{self.tuner} does not support a weighted combination of adapter {adapter!r}, because it loses "
                    f"what `{lost[0]}` adds. Merge the adapters into the base model instead, with "
                    f"merge_and_unload(adapter_names=…)."
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
                        f"{self.tuner} does not support combination_type={self.type!r} for Conv1d and Conv3d layers "
                        f"such as {name!r}. Use 'cat'."
                    )
            elif len(set(ranks)) > 1:
                raise ValueError(
                    f"{self.tuner} does not support combination_type={self.type!r} for different ranks, because it "
                    f"adds the factors entry by entry. All adapters must have the same r value in each module, but "
                    f"they have {ranks} in {name!r}. Use 'cat', or a type that ends in 'svd'."
                )

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, LoraLayer, list[int]]]:
        """Every layer that has at least one of the adapters, with their ranks in it."""
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and (ranks := [layer.r[a] for a in self.adapters if a in layer.r]):
                yield name, layer, ranks

    def _ranks(self, model: nn.Module, svd_rank: int) -> dict[str, int]:
        """The new adapter's rank in each module, as a pattern whose keys match full names only."""
        combined = {}
        for name, layer, ranks in self._layers(model):
            rank = sum(ranks) if self.type == "cat" else max(ranks)
            if self.type.endswith("svd"):
                rank = svd_rank
                if isinstance(layer.get_base_layer(), nn.Conv2d):  # the svd types cannot pad kernels with zeros
                    A, B = _factors(layer, next(adapter for adapter in self.adapters if adapter in layer.r))
                    rank = min(svd_rank, A.numel() // A.shape[0], B.numel() // A.shape[0])
            if ".base_layer." not in name:  # an attention layer's output projection shares the layer's entry
                combined["^" + re.escape(name)] = rank
        return combined


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
