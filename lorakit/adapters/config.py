"""An adapter's config as far as its arithmetic goes: read from JSON or a dict, checked, without importing PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.adapters.keys import parse_key
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.naming.inits import changes_base_weights
from lorakit.naming.patterns import lookup, unmatched

SUPPORTED_TYPES = ("LORA", "SPECLORA", "FISHERLORA", "ADALORA")
# Variants under which B A is not the update, nor a part of it that means something alone.
_REFUSED = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config")


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter's config says of its arithmetic. `r` None: there is no config, so ranks and alphas are unknown.

    `raw` is the config as it was found, for whoever writes it on.
    """

    peft_type: str = "LORA"
    r: int | None = None
    alpha: float = 1.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    init: str | None = None
    base_model: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: object) -> AdapterSettings:
        """Read a config: what `adapter_config.json` holds, or a PeftConfig's `to_dict()`.

        Raises: AdapterFileError for values that no adapter can have; UnsupportedModelError for a `peft_type`, or a
        variant of LoRA, that is not covered.
        """
        if not isinstance(config, Mapping):
            raise AdapterFileError(f"An adapter's config must be a JSON object; got {type(config).__name__}.")
        peft_type = getattr(config.get("peft_type"), "value", config.get("peft_type"))
        if peft_type not in SUPPORTED_TYPES:
            raise UnsupportedModelError(
                f"The adapter's `peft_type` is {_shown(peft_type)}; supported are {', '.join(SUPPORTED_TYPES)}."
            )
        refused = [name for name in _REFUSED if config.get(name)]
        if refused:
            raise UnsupportedModelError(
                f"The adapter uses {' and '.join(f'`{name}`' for name in refused)}, under which B A is not its update."
            )
        ada = peft_type == "ADALORA"
        r = _rank("init_r" if ada else "r", config.get("init_r" if ada else "r"))
        alpha = config.get("lora_alpha")
        if alpha is None and peft_type == "FISHERLORA":
            alpha = 2 * r
        rank_pattern = _pattern("rank_pattern", config.get("rank_pattern"))
        if ada:
            for key, mask in rank_pattern.items():
                if not (isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask)):
                    raise AdapterFileError(
                        f"AdaLoRA's `rank_pattern` must have lists of true and false; got {_shown(mask)} for {key!r}."
                    )
        else:
            rank_pattern = {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in rank_pattern.items()}
        alphas = _pattern("alpha_pattern", config.get("alpha_pattern"))
        init = config.get("init_lora_weights")
        base = config.get("base_model_name_or_path")
        return cls(
            peft_type=peft_type,
            r=r,
            alpha=_number("lora_alpha", alpha),
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            rank_pattern=rank_pattern,
            alpha_pattern={key: _number(f"alpha_pattern[{key!r}]", value) for key, value in alphas.items()},
            modules_to_save=_names("modules_to_save", config.get("modules_to_save")),
            target_parameters=_names("target_parameters", config.get("target_parameters")),
            init=init if isinstance(init, str) else None,
            base_model=base if isinstance(base, str) else None,
            raw=dict(config),
        )

    @property
    def changes_base(self) -> bool:
        """Whether the adapter was made with an init that changed the base weights."""
        return changes_base_weights(self.init)

    def rank_of(self, module_name: str) -> int | None:
        """The rank that PEFT gives the module; None where the config does not say."""
        if self.r is None:
            return None
        if self.peft_type == "ADALORA":
            mask = self._rank_mask(module_name)
            return self.r if mask is None else sum(mask)
        return lookup(self.rank_pattern, module_name, self.r)

    def scaling_of(self, module_name: str, rank: int) -> float:
        """The factor of B A: alpha / r, or alpha / √r under rsLoRA, r and alpha by PEFT's patterns; 1 with no config.

        AdaLoRA's is alpha over its initial rank, whatever was pruned since. `rank` is that of the tensors.
        """
        if self.r is None:
            return 1.0
        if self.peft_type == "ADALORA":
            return (self.alpha if self.alpha > 0 else rank) / (self.r + 1e-5)
        alpha = lookup(self.alpha_pattern, module_name, self.alpha)
        r = lookup(self.rank_pattern, module_name, self.r)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def unmatched_patterns(self, module_names: list[str]) -> list[tuple[str, str]]:
        """Entries of the patterns, as (field, key), that match none of the modules."""
        if self.peft_type == "ADALORA":
            return [("rank_pattern", key) for key in self.rank_pattern if _masked_module(key) not in module_names]
        fields = (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
        return [(name, key) for name, pattern in fields for key in unmatched(pattern, module_names)]

    def _rank_mask(self, module_name: str) -> list[bool] | None:
        return next((mask for key, mask in self.rank_pattern.items() if _masked_module(key) == module_name), None)


def _masked_module(key: str) -> str | None:
    """The module of a key of AdaLoRA's `rank_pattern`, such as ``layers.0.q_proj.lora_E``."""
    parsed = parse_key(key)
    return None if parsed is None else parsed.module_name


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise AdapterFileError(f"`{name}` in the adapter's config must be a positive integer; got {_shown(value)}.")
    return value


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise AdapterFileError(f"`{name}` in the adapter's config must be a finite number; got {_shown(value)}.")


def _pattern(name: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise AdapterFileError(f"`{name}` in the adapter's config must be an object; got {_shown(value)}.")
    for key in value:
        try:
            re.compile(key)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise AdapterFileError(
                f"`{name}` in the adapter's config has the key {_shown(key)}, which is no regular expression: {error}."
            ) from None
    return dict(value)


def _names(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple | set) or not all(isinstance(item, str) for item in value):
        raise AdapterFileError(f"`{name}` in the adapter's config must be a list of names; got {_shown(value)}.")
    return tuple(sorted(value))
