"""The configs of a rank sweep."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftConfig

from lorakit.experiments._settings import distinct_integers
from lorakit.naming.patterns import alpha_of

_TEMPLATES = ("LORA", "FISHERLORA", "SPECLORA")


def named_configs(configs: Any, ranks: Sequence[int] | None) -> dict[str, tuple[int | None, PeftConfig]]:
    """A copy of each config by name, with its rank if it has one.

    Raises: ValueError for a template that cannot be scaled to a rank, for no configs, and for duplicate names.
    """
    if isinstance(configs, Mapping):
        if ranks is not None:
            raise ValueError("`ranks` scale a template config. A mapping has one config a name: leave `ranks` out.")
        wrong = [name for name, config in configs.items() if not isinstance(config, PeftConfig)]
        if wrong or not configs:
            raise ValueError(f"`configs` must map names to PEFT configs, at least one; got {wrong or 'none'}.")
        named = {
            str(name): (name if isinstance(name, int) else None, copy.deepcopy(config))
            for name, config in configs.items()
        }
        if len(named) != len(configs):
            raise ValueError(f"`configs` must have different names; got {list(configs)!r}.")
        return named
    if not isinstance(configs, PeftConfig):
        raise ValueError(f"`configs` must be a PEFT config or a mapping of them; got {type(configs).__name__}.")
    return {str(rank): (rank, at_rank(configs, rank)) for rank in distinct_integers("ranks", ranks, positive=True)}


def at_rank(config: Any, rank: int) -> Any:
    """A copy of a LoRA config with all ranks multiplied by rank / r and every module's scaling unchanged.

    Raises: ValueError for a config of another PEFT method, and for ranks that would not be integers.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _TEMPLATES or not isinstance(config, LoraConfig):
        raise ValueError(
            f"A template config must be one of {', '.join(_TEMPLATES)}; got {kind}. Pass a mapping of configs."
        )
    scaled: Any = copy.deepcopy(config)

    def times(value: int, what: str) -> int:
        if value * rank % config.r:
            raise ValueError(
                f"`{what}` {value} at r = {config.r} would be {value * rank / config.r:g} at rank {rank}, which is not "
                f"an integer. Leave that rank out, or pass a mapping of configs."
            )
        return int(value * rank // config.r)

    def alpha(value: float) -> float:
        return alpha_of(value, rank, config.r, bool(config.use_rslora))

    scaled.r, scaled.lora_alpha = rank, alpha(config.lora_alpha)
    scaled.rank_pattern = {
        key: times(value, f"rank_pattern[{key!r}]") for key, value in (config.rank_pattern or {}).items()
    }
    scaled.alpha_pattern = {key: alpha(value) for key, value in (config.alpha_pattern or {}).items()}
    for name in ("r_q", "r_v"):
        if getattr(config, name, None) is not None:
            setattr(scaled, name, times(getattr(config, name), name))
    return scaled
