"""FisherLoRA: LoRA with a lower rank in query projections than in value projections, at one common scaling.

Reference: "LoRA-Lens", section 4 (keep V, reduce Q: value projections lie in steeper regions of the loss).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from lorakit._registration import register_tuner
from lorakit.allocation.report import Per, Rule
from lorakit.errors import UnsupportedModelError
from lorakit.naming.patterns import (
    alpha_of,
    compact_pattern,
    targeted_modules,
    targeted_parameters,
    values_of,
    warn_unmatched,
)
from lorakit.naming.roles import role_of
from lorakit.naming.targets import default_targets
from lorakit.tuners._base import InitWeightsAlias, ResolvingLoraModel, integer_errors

if TYPE_CHECKING:
    from lorakit.allocation.probed import ProbeReport


@dataclass
class FisherLoRAConfig(InitWeightsAlias, LoraConfig):
    """LoRA with rank `r_q` in query projections, `r_v` in value projections and `r` in every other targeted module.

    Takes every argument of `peft.LoraConfig`, with the same meaning except for these:

    Args:
        r: the rank of all other targeted modules, and the rank that `lora_alpha` refers to.
        lora_alpha: None means ``2 * r``. The scaling is ``lora_alpha / r`` in every module, whatever its own rank (with
            `use_rslora`, ``lora_alpha / sqrt(r)``).
        target_modules: None means the query and value projections, found by name.
        target_parameters: as in LoRA. ``…q_proj.weight`` counts as ``…q_proj``; expert weights have rank `r`.
        r_q: the rank of query projections.
        r_v: the rank of value projections; None means `r`.
        rank_pattern: an entry overrides `r`, `r_q` and `r_v`.
        alpha_pattern: an entry is the module's own alpha, as in LoRA: its scaling is alpha over its own rank.

    When the adapter is added to a model, all ranks and alphas are written into `rank_pattern` and `alpha_pattern` of a
    copy, which is ``model.peft_config[...]``; the config that was passed does not change. A FisherLoRA adapter computes
    what a plain LoRA of these ranks computes, and has the same tensors (see `lorakit.export.to_lora`).

    Raises: ValueError for a rank that is not a positive integer.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> base = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in ("q_proj", "v_proj")})
        >>> model = get_peft_model(base, FisherLoRAConfig(r=16, r_q=4))
        >>> {name: layer.r["default"] for name, layer in model.base_model.model.items()}
        {'q_proj': 4, 'v_proj': 16}
        >>> {name: layer.scaling["default"] for name, layer in model.base_model.model.items()}
        {'q_proj': 2.0, 'v_proj': 2.0}
    """

    r: int = field(default=16, metadata={"help": "Rank of modules that are neither query nor value projections."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Alpha; None means 2r. Every module has the scaling lora_alpha / r."}
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
        wrong = integer_errors(ranks)
        if wrong:
            raise ValueError("FisherLoRA: " + " ".join(wrong))

    @classmethod
    def from_probe(
        cls,
        report: ProbeReport,
        *,
        budget: float | None = None,
        params: int | None = None,
        rule: Rule | None = None,
        r: int = 16,
        min_rank: int = 1,
        max_rank: int | None = None,
        per: Per = "module",
        **settings: Any,
    ) -> FisherLoRAConfig:
        """A config for the modules that `lorakit.fisher.probe` measured, with ranks under a budget.

        Args:
            report: what `lorakit.fisher.probe` returned.
            budget: a fraction in (0, 1] of the parameters that uniform rank `r` would have on the same modules; 0.625
                if neither this nor `params` is given.
            params: the budget as a number of parameters.
            rule: see `lorakit.allocation.allocate`. Any but "energy", which needs the spectra of a trained adapter.
                None means the paper's, "fisherlora", where query and value projections were probed, and else "fisher".
            r: the rank that `lora_alpha` refers to. Every module has the scaling ``lora_alpha / r``, 2 by default.
            min_rank: the smallest rank of a module.
            max_rank: the largest rank of a module. None means `r` for the rules "fisherlora", "spectral" and "uniform",
                and 2r for the others.
            per: "role" gives all modules of one role the same rank.
            settings: other fields of the config, such as `task_type`.

        Warns if the rule is "fisherlora" and the 90 % interval of the V/Q ratio does not lie above 1.
        Raises: AllocationError (a ValueError) if the budget does not cover `min_rank` in all modules, or the rule does
        not fit; ValueError for an invalid budget or rank.
        """
        from lorakit.allocation.probed import ranks_from_probe

        allocation = ranks_from_probe(
            report, budget=budget, params=params, rule=rule, r=r, min_rank=min_rank, max_rank=max_rank, per=per
        )
        ranks = allocation.ranks
        implied = {name for name, rank in ranks.items() if rank == r}
        fixed: dict[str, Any] = {"r_q": r, "r_v": r, "rank_pattern": compact_pattern(ranks, implied)}
        taken = sorted({*fixed, "alpha_pattern"} & set(settings))
        if taken:
            raise ValueError(f"FisherLoRA: `from_probe` sets {taken} itself; leave them out.")
        defaults: dict[str, Any] = {"lora_alpha": 2 * r, "target_modules": list(report.target_modules)}
        return cls(r=r, **(defaults | settings | fixed))


class FisherLoRAModel(ResolvingLoraModel):
    """PEFT's LoRA model, which writes the ranks of all modules into a copy of the config before it adds an adapter."""

    tuner_name = "FisherLoRA"

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # `resolve` warns itself, because PEFT does not count the names of parameters.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(*args, **kwargs)

    def resolve(self, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None) -> None:
        if config.peft_type != PeftType.FISHERLORA:
            return
        if config.target_modules is None:
            try:
                config.target_modules = default_targets(model)
            except UnsupportedModelError:
                if not config.target_parameters:
                    raise
        modules = {} if config.target_modules is None else targeted_modules(self, config, model, state_dict)
        names = list(modules)
        names += targeted_parameters(config, model)
        given_ranks, given_alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
        if self.combination is not None:
            config.r_q = config.r_v = config.r
        by_role = {"query": config.r_q, "value": config.r if config.r_v is None else config.r_v}
        role_ranks = {name: by_role.get(role_of(name.removesuffix(".weight")) or "", config.r) for name in names}
        ranks = values_of(given_ranks, role_ranks)
        same_scaling = {
            name: alpha_of(config.lora_alpha, rank, config.r, config.use_rslora) for name, rank in ranks.items()
        }
        alphas = values_of(given_alphas, same_scaling)
        warn_unmatched("FisherLoRA", "rank_pattern", given_ranks, names)
        warn_unmatched("FisherLoRA", "alpha_pattern", given_alphas, names)
        # An entry is left out only where PEFT's default and, after loading, the rules above both imply its value.
        config.rank_pattern = compact_pattern(ranks, {n for n in names if ranks[n] == role_ranks[n] == config.r})
        config.alpha_pattern = compact_pattern(
            alphas, {n for n in names if alphas[n] == same_scaling[n] == config.lora_alpha}
        )

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, state_dict: dict[str, Tensor], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        # PEFT doubles r and the patterns only.
        converted: dict[str, Tensor] = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path, state_dict, kwargs
        )
        peft_config.r_q *= 2
        peft_config.r_v = peft_config.r_v and 2 * peft_config.r_v
        return converted


register_tuner(
    "fisherlora",
    FisherLoRAConfig,
    FisherLoRAModel,
    hotswap_keys=["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"],
)
