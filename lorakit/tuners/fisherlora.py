"""FisherLoRA: LoRA whose query projections get a lower rank than its value projections, at one and the same scaling.

Reference: "LoRA-Lens", section 4 (keep V, reduce Q: value projections lie in steeper regions of the loss).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit._registration import register_tuner
from lorakit.errors import UnsupportedModelError
from lorakit.tuners.base import NamesItsInit, ResolvingLoraModel
from lorakit.tuners.patterns import (
    compact_pattern,
    lookup,
    targeted_modules,
    targeted_parameters,
    warn_of_unmatched,
)
from lorakit.tuners.roles import role_of


@dataclass
class FisherLoRAConfig(NamesItsInit, LoraConfig):
    """LoRA with rank `r_q` in query projections, `r_v` in value projections and `r` in every other targeted module.

    All that `peft.LoraConfig` takes is taken here, and means the same. What differs:

    Args:
        r: the rank of targeted modules that are neither query nor value projections, and the one that `lora_alpha`
            refers to.
        lora_alpha: None means ``2 * r``, and is replaced by it at once. The scaling is ``lora_alpha / r`` (with
            `use_rslora`, ``lora_alpha / sqrt(r)``) in every module, whatever its own rank.
        target_modules: None means the query and value projections, found by their names.
        target_parameters: as in LoRA; ``…q_proj.weight`` has the role of ``…q_proj``, expert weights have rank `r`.
        r_q: the rank of query projections.
        r_v: the rank of value projections; None means `r`.
        rank_pattern: an entry wins over `r`, `r_q` and `r_v`.
        alpha_pattern: an entry is that module's own alpha, as in LoRA: its scaling is alpha over its own rank.

    Once the model is known, the copy kept in ``model.peft_config`` has the ranks and alphas spelled out as
    `rank_pattern` and `alpha_pattern`; the config object passed in stays as it was. In arithmetic, and in the tensors
    of its checkpoint, a FisherLoRA adapter is a plain LoRA (see `lorakit.export.to_lora`).

    Raises: ValueError for a rank that is not a positive integer.
    """

    r: int = field(default=16, metadata={"help": "Rank of modules that are neither query nor value projections."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Alpha; None means 2r. The scaling lora_alpha / r is that of every module."}
    )
    r_q: int = field(default=4, metadata={"help": "Rank of query projections."})
    r_v: int | None = field(default=None, metadata={"help": "Rank of value projections; None means r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FISHERLORA
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        ranks: dict[str, Any] = {"r": self.r, "r_q": self.r_q, "r_v": self.r if self.r_v is None else self.r_v}
        ranks |= {f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}
        wrong = [
            f"`{name}` must be a positive integer; got {value!r}."
            for name, value in ranks.items()
            if isinstance(value, bool) or not isinstance(value, int) or value < 1
        ]
        if wrong:
            raise ValueError("FisherLoRA: " + " ".join(wrong))


class FisherLoRAModel(ResolvingLoraModel):
    """PEFT's LoRA model; before injecting an adapter it writes out its ranks as patterns, in a copy of its config."""

    _combination: _Combination | None = None  # what add_weighted_adapter is about

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # Said by `resolve`, which knows the names of parameters too.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(*args, **kwargs)

    def resolve(self, config: Any, model: nn.Module) -> None:
        if config.peft_type != PeftType.FISHERLORA:
            return
        if config.target_modules is None:
            try:
                config.target_modules = default_targets(model)
            except UnsupportedModelError:
                if not config.target_parameters:
                    raise
        names: list[str] = [] if config.target_modules is None else list(targeted_modules(self, config, model))
        names += targeted_parameters(config, model)
        given_ranks, given_alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
        if self._combination is None:
            by_role = {"query": config.r_q, "value": config.r if config.r_v is None else config.r_v}
            role_ranks = {name: by_role.get(role_of(name.removesuffix(".weight")) or "", config.r) for name in names}
        else:
            config.r_q = config.r_v = config.r
            config.lora_alpha = math.sqrt(config.r) if config.use_rslora else config.r  # the scaling is 1
            config.init_lora_weights = True  # other ways may change the base weights
            role_ranks = dict.fromkeys(names, config.r)
            given_ranks = self._combination.ranks(model, config.r)
        ranks = {name: lookup(given_ranks, name, role_ranks[name]) for name in names}
        same_scaling = {
            name: _alpha(config.lora_alpha, rank, config.r, config.use_rslora) for name, rank in ranks.items()
        }
        alphas = {name: lookup(given_alphas, name, same_scaling[name]) for name in names}
        warn_of_unmatched("FisherLoRA", "rank_pattern", given_ranks, names)
        warn_of_unmatched("FisherLoRA", "alpha_pattern", given_alphas, names)
        # An entry is left out only where both PEFT's default and, once it is loaded again, the rules above imply it.
        config.rank_pattern = compact_pattern(ranks, {n for n in names if ranks[n] == role_ranks[n] == config.r})
        config.alpha_pattern = compact_pattern(
            alphas, {n for n in names if alphas[n] == same_scaling[n] == config.lora_alpha}
        )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """As `peft.LoraModel.add_weighted_adapter`, with a rank for each module, which the new config records.

        A module's rank is the sum of its ranks in `adapters` for "cat"; `svd_rank`, or the largest rank anywhere in
        `adapters`, for the types that end in "svd", but at most min(d_in, d_out) and, for "svd" itself, the sum of its
        ranks; for the other types, the one rank that all of them have there.
        Raises: ValueError where the result would not be the combination that was asked for, or where PEFT refuses;
        the model is then as it was before.
        """
        if adapter_name in self.peft_config:
            return
        self._combination = _Combination(adapters, "linear" if len(adapters) == 1 else combination_type)
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, svd_rank, **kwargs)
        except BaseException:
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        finally:
            self._combination = None

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, Any]:
        if self._combination is not None:
            self._combination.check(self.model, self.peft_config)
        checked: tuple[str, int, Any] = super()._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        return checked

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: LoraLayer,
        target_lora_A: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rank = target_lora_A.shape[0]
        factors: tuple[Tensor, Tensor] = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type, adapters, weights, rank, target, target_lora_A, *args, **kwargs
        )
        return factors

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, state_dict: dict[str, Tensor], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        # PEFT doubles r and the patterns, but knows nothing of these.
        converted: dict[str, Tensor] = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path, state_dict, kwargs
        )
        peft_config.r_q *= 2
        peft_config.r_v = peft_config.r_v and 2 * peft_config.r_v
        return converted


@dataclass(frozen=True)
class _Combination:
    """The adapters that become a new one, and how."""

    adapters: list[str]
    type: str

    def layers(self, model: nn.Module) -> Iterator[tuple[str, LoraLayer, list[int]]]:
        """The layers that have any of the adapters, with their ranks there."""
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and (ranks := [layer.r[a] for a in self.adapters if a in layer.r]):
                yield name, layer, ranks

    def ranks(self, model: nn.Module, svd_rank: int) -> dict[str, int]:
        """The rank of the combination in each module; keyed by patterns that match the full names alone."""
        combined = {}
        for name, layer, ranks in self.layers(model):
            rank = sum(ranks) if self.type in ("cat", "svd") else max(ranks)
            if self.type.endswith("svd"):
                A, B = _factors(layer, next(adapter for adapter in self.adapters if adapter in layer.r))
                limits = [svd_rank, A.numel() // A.shape[0], B.numel() // A.shape[0]]
                rank = min(rank, *limits) if self.type == "svd" else min(limits)
            if ".base_layer." not in name:  # the output projection of an attention layer goes by its name
                combined["^" + re.escape(name)] = rank
        return combined

    def check(self, model: nn.Module, configs: Mapping[str, Any]) -> None:
        """Raise ValueError where PEFT's arithmetic would fail half-way, or would give something else."""
        for adapter in self.adapters:
            config = configs.get(adapter)
            lost = [flag for flag in ("use_dora", "lora_bias") if getattr(config, flag, False)]
            if lost:
                raise ValueError(
                    f"FisherLoRA: a weighted combination loses what `{lost[0]}` adds to adapter {adapter!r}. "
                    f"Merge the adapters into the base model instead, with merge_and_unload(adapter_names=…)."
                )
        for name, layer, ranks in self.layers(model):
            base = layer.get_base_layer()
            if self.type == "cat" or self.type.endswith("svd"):
                if getattr(base, "groups", 1) > 1:
                    raise ValueError(
                        f"FisherLoRA: {self.type!r} is not defined for the grouped convolution {name!r}; "
                        f"use 'linear', with adapters of equal ranks."
                    )
                if self.type != "cat" and isinstance(base, nn.Conv1d | nn.Conv3d):
                    raise ValueError(
                        f"FisherLoRA: combination_type={self.type!r} takes no Conv1d or Conv3d, which {name!r} is. "
                        f"Use 'cat'."
                    )
            elif len(set(ranks)) > 1:
                raise ValueError(
                    f"FisherLoRA: combination_type={self.type!r} adds A to A and B to B. All adapters must have the "
                    f"same r value in each module, but they have {ranks} in {name!r}. Use 'cat', or a type that ends "
                    f"in 'svd'."
                )


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


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


def _alpha(lora_alpha: float, rank: int, r: int, use_rslora: bool) -> float:
    """The alpha that gives a module of rank `rank` the scaling that `lora_alpha` means at rank `r`."""
    alpha = lora_alpha * math.sqrt(rank / r) if use_rslora else lora_alpha * rank / r
    return int(alpha) if float(alpha).is_integer() else alpha


register_tuner(
    "fisherlora",
    FisherLoRAConfig,
    FisherLoRAModel,
    hotswap_keys=["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"],
)
