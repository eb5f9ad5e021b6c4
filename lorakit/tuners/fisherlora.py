"""FisherLoRA: LoRA whose query projections get a lower rank than its value projections, at one and the same scaling.

Reference: "LoRA-Lens", section 4 (keep V, reduce Q: value projections lie in steeper regions of the loss).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.peft_types import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit._registration import register_tuner
from lorakit.errors import UnsupportedModelError
from lorakit.tuners.base import NamesItsInit, ResolvingLoraModel
from lorakit.tuners.patterns import compact_pattern, lookup, targeted_modules, warn_of_unmatched
from lorakit.tuners.roles import role_of


@dataclass
class FisherLoRAConfig(NamesItsInit, LoraConfig):
    """LoRA with rank `r_q` in query projections, `r_v` in value projections and `r` in every other targeted module.

    All that `peft.LoraConfig` takes is taken here, and means the same. What differs:

    Args:
        r: the rank of targeted modules that are neither query nor value projections, and the one that `lora_alpha`
            refers to.
        lora_alpha: None means ``2 * r``. The scaling is ``lora_alpha / r`` (with `use_rslora`,
            ``lora_alpha / sqrt(r)``) in every module, whatever its own rank.
        target_modules: None means the query and value projections, found by their names.
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

    _merging_adapters = False

    def resolve(self, config: Any, model: nn.Module) -> None:
        if config.peft_type != PeftType.FISHERLORA:
            return
        if self._merging_adapters:  # the ranks of a combination of adapters are PEFT's to choose
            config.r_q = config.r_v = config.r
        if config.lora_alpha is None:
            config.lora_alpha = 2 * config.r
        if config.target_modules is None:
            try:
                config.target_modules = default_targets(model)
            except UnsupportedModelError:
                if not config.target_parameters:
                    raise
        given_ranks, given_alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
        config.rank_pattern, config.alpha_pattern = given_ranks, given_alphas
        if config.target_modules is None:
            return
        modules = targeted_modules(self, config, model)
        by_role = {"query": config.r_q, "value": config.r if config.r_v is None else config.r_v}
        role_ranks = {name: by_role.get(role_of(name) or "", config.r) for name in modules}
        ranks = {name: lookup(given_ranks, name, role_ranks[name]) for name in modules}
        same_scaling = {
            name: _alpha(config.lora_alpha, rank, config.r, config.use_rslora) for name, rank in ranks.items()
        }
        alphas = {name: lookup(given_alphas, name, same_scaling[name]) for name in modules}
        warn_of_unmatched("FisherLoRA", "rank_pattern", given_ranks, modules)
        warn_of_unmatched("FisherLoRA", "alpha_pattern", given_alphas, modules)
        # An entry is left out only where both PEFT's default and, once it is loaded again, the rules above imply it.
        config.rank_pattern = compact_pattern(ranks, {n for n in modules if ranks[n] == role_ranks[n] == config.r})
        config.alpha_pattern = compact_pattern(
            alphas, {n for n in modules if alphas[n] == same_scaling[n] == config.lora_alpha}
        )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `peft.LoraModel.add_weighted_adapter`; the ranks that come out are recorded, so that it can be loaded."""
        self._merging_adapters = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._merging_adapters = False
        config = self.peft_config[adapter_name]
        ranks = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                rank = layer.lora_A[adapter_name].weight.shape[0]
                layer.r[adapter_name] = ranks[name] = rank
                layer.lora_alpha[adapter_name] = _alpha(config.lora_alpha, rank, config.r, config.use_rslora)
        alphas = {name: _alpha(config.lora_alpha, rank, config.r, config.use_rslora) for name, rank in ranks.items()}
        config.rank_pattern = compact_pattern(ranks, {name for name in ranks if ranks[name] == config.r})
        config.alpha_pattern = compact_pattern(alphas, {name for name in alphas if alphas[name] == config.lora_alpha})


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
            f"(and {len(fused) - 1} more) computes query, key and value in one matrix. Pass `target_modules` yourself, "
            f"for instance target_modules=[{fused[0].rpartition('.')[2]!r}], which then takes rank `r`."
        )
    linear = sorted({name.rpartition(".")[2] for name in roles})
    raise UnsupportedModelError(
        f"FisherLoRA found no query and value projections by name in {type(model).__name__}. Pass `target_modules`; "
        f"its linear modules are named {linear}."
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
