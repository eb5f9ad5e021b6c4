"""FisherLoRA: LoRA whose query projections get a lower rank than its value projections, at one and the same scaling.

Reference: "LoRA-Lens", section 4 (keep V, reduce Q: value projections lie in steeper regions of the loss).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from lorakit._registration import register_tuner
from lorakit.allocation import Allocation, Per, ProbeReport, Rule, allocate
from lorakit.errors import AllocationError, UnsupportedModelError
from lorakit.naming.patterns import (
    alpha_of,
    compact_pattern,
    lookup,
    targeted_modules,
    targeted_parameters,
    warn_unmatched,
)
from lorakit.naming.roles import role_of
from lorakit.naming.targets import default_targets
from lorakit.tuners._base import NamesItsInit, ResolvingLoraModel, not_positive_integers


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
        wrong = not_positive_integers(ranks)
        if wrong:
            raise ValueError("FisherLoRA: " + " ".join(wrong))

    @classmethod
    def from_probe(
        cls,
        report: ProbeReport,
        *,
        budget: float | None = None,
        params: int | None = None,
        rule: Rule = "fisher",
        r: int = 16,
        min_rank: int = 1,
        max_rank: int | None = None,
        per: Per = "module",
        **settings: Any,
    ) -> FisherLoRAConfig:
        """A config for the modules of a `lorakit.fisher.probe` whose ranks a budget and a rule decide.

        Args:
            budget: a fraction in (0, 1] of the parameters of uniform rank `r` on the same modules; 0.625 if neither
                this nor `params` is given.
            params: the budget as a number of parameters.
            rule, min_rank, per: see `lorakit.allocation.allocate`; "energy" needs a trained adapter's spectra, which a
                probe has not.
            r: the rank that `lora_alpha` refers to: its scaling, ``2`` if not given, is that of every module.
            max_rank: None is `r` for "fisherlora", "spectral" and "uniform", and min(d_out, d_in) for the rest.
            settings: other fields of the config, such as `task_type`.

        Raises: AllocationError (a ValueError) for a budget below `min_rank` everywhere and what the rule cannot use;
        ValueError for a budget or a rank that is none.
        """
        allocation = allocation_of(
            report, budget=budget, params=params, rule=rule, r=r, min_rank=min_rank, max_rank=max_rank, per=per
        )
        ranks = allocation.ranks
        implied = {name for name, rank in ranks.items() if rank == r}
        fixed: dict[str, Any] = {"r_q": r, "r_v": r, "rank_pattern": compact_pattern(ranks, implied)}
        taken = sorted({*fixed, "alpha_pattern"} & set(settings))
        if taken:
            raise ValueError(f"FisherLoRA: `from_probe` decides {taken} itself; leave them out.")
        defaults: dict[str, Any] = {"lora_alpha": 2 * r, "target_modules": list(report.target_modules)}
        return cls(r=r, **(defaults | settings | fixed))


def allocation_of(
    report: ProbeReport,
    *,
    budget: float | None = None,
    params: int | None = None,
    rule: Rule = "fisher",
    r: int = 16,
    min_rank: int = 1,
    max_rank: int | None = None,
    per: Per = "module",
) -> Allocation:
    """The ranks that `FisherLoRAConfig.from_probe` takes, with their explanation; arguments and errors as there."""
    if budget is not None and params is not None:
        raise ValueError("Pass `budget`, a fraction, or `params`, a number of parameters, not both.")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"`r` must be a positive integer; got {r!r}.")
    if rule == "energy":
        raise AllocationError("The rule 'energy' needs the spectra of a trained adapter; a probe has none.")
    costs = {row.module_name: row.d_out + row.d_in for row in report.modules}
    if params is None:
        budget = 0.625 if budget is None else budget
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(
                f"`budget` must be a fraction in (0, 1] of uniform rank {r}; got {budget!r}. A number of parameters is "
                f"`params`."
            )
        params = math.floor(budget * r * sum(costs.values()) + 1e-6)
    whole = {row.module_name: min(row.d_out, row.d_in) for row in report.modules}
    bound = r if max_rank is None and rule in ("fisherlora", "spectral", "uniform") else max_rank
    bounds = whole if bound is None else {name: min(bound, largest) for name, largest in whole.items()}
    return allocate(
        {row.module_name: row.fisher for row in report.modules},
        costs,
        params,
        rule=rule,
        min_rank=min_rank,
        max_rank=bounds,
        per=per,
        roles={row.module_name: row.role for row in report.modules},
        d_out={row.module_name: row.d_out for row in report.modules},
    )


class FisherLoRAModel(ResolvingLoraModel):
    """PEFT's LoRA model; before injecting an adapter it writes out its ranks as patterns, in a copy of its config."""

    tuner_name = "FisherLoRA"

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # Said by `resolve`, which knows the names of parameters too.
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
        ranks = {name: lookup(given_ranks, name, role_ranks[name]) for name in names}
        same_scaling = {
            name: alpha_of(config.lora_alpha, rank, config.r, config.use_rslora) for name, rank in ranks.items()
        }
        alphas = {name: lookup(given_alphas, name, same_scaling[name]) for name in names}
        warn_unmatched("FisherLoRA", "rank_pattern", given_ranks, names)
        warn_unmatched("FisherLoRA", "alpha_pattern", given_alphas, names)
        # An entry is left out only where both PEFT's default and, once it is loaded again, the rules above imply it.
        config.rank_pattern = compact_pattern(ranks, {n for n in names if ranks[n] == role_ranks[n] == config.r})
        config.alpha_pattern = compact_pattern(
            alphas, {n for n in names if alphas[n] == same_scaling[n] == config.lora_alpha}
        )

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


register_tuner(
    "fisherlora",
    FisherLoRAConfig,
    FisherLoRAModel,
    hotswap_keys=["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"],
)
