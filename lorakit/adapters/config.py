"""The fields of an adapter's config that its arithmetic depends on: read from JSON or a dict, checked, without PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorakit.adapters.keys import parse_key
from lorakit.errors import AdapterFileError, PatternError, UnsupportedModelError
from lorakit.naming.inits import changes_base_weights
from lorakit.naming.matching import PatternMatcher

V = TypeVar("V")

SUPPORTED_TYPES = ("LORA", "SPECLORA", "FISHERLORA", "ADALORA")
# Variants of LoRA whose update is not B A, and of which B A alone means nothing.
_REFUSED = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config")


@dataclass(frozen=True)
class ModuleConfig:
    """The rank that a config gives a module (None: there is no config), and the factor of B A.

    The scaling is alpha / r, or alpha / √r under rsLoRA, with r and alpha by the patterns; AdaLoRA's is alpha over its
    initial rank, however much was pruned since. It is 1 without a config.
    """

    rank: int | None
    scaling: float


@dataclass(frozen=True)
class ResolvedConfig:
    """What a config gives each module by name; `unmatched` are the patterns' keys that match none, as (field, key)."""

    modules: Mapping[str, ModuleConfig]
    unmatched: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AdapterSettings:
    """The fields of an adapter's config that its arithmetic depends on.

    `r` is None if there is no config, so that ranks and alphas are unknown. `raw` is the whole config as it was found.
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

    def resolve(self, module_names: Collection[str]) -> ResolvedConfig:
        """The rank and scaling that PEFT gives each of the modules, and the patterns' keys that match none of them."""
        if self.r is None:
            return ResolvedConfig({name: ModuleConfig(None, 1.0) for name in module_names}, ())
        if self.peft_type == "ADALORA":
            return self._resolve_adalora(self.r, module_names)
        ranks, no_rank = _matched("rank_pattern", self.rank_pattern, module_names, self.r)
        alphas, no_alpha = _matched("alpha_pattern", self.alpha_pattern, module_names, self.alpha)
        modules = {
            name: ModuleConfig(r, alphas[name] / (math.sqrt(r) if self.use_rslora else r)) for name, r in ranks.items()
        }
        return ResolvedConfig(modules, (*no_rank, *no_alpha))

    def _resolve_adalora(self, r: int, module_names: Collection[str]) -> ResolvedConfig:
        """Its rank pattern has a list for each module, whose true entries are the kept ones of the initial rank r."""
        kept: dict[str | None, int] = {}
        for key, mask in self.rank_pattern.items():
            kept.setdefault(_masked_module(key), sum(mask))
        modules = {}
        for name in module_names:
            rank = kept.get(name, r)
            modules[name] = ModuleConfig(rank, (self.alpha if self.alpha > 0 else rank) / (r + 1e-5))
        known = set(module_names)
        unmatched = [("rank_pattern", key) for key in self.rank_pattern if _masked_module(key) not in known]
        return ResolvedConfig(modules, tuple(unmatched))


def _matched(
    field_name: str, pattern: Mapping[str, V], names: Collection[str], default: V
) -> tuple[dict[str, V], list[tuple[str, str]]]:
    """Each module's value: under the first key that matches, or as in PEFT under its name; and the unmatched keys."""
    try:
        matcher = PatternMatcher(pattern)
        found = {name: matcher.first(name) for name in names}
        unmatched = [(field_name, key) for key in matcher.unmatched(names)]
    except PatternError as error:
        raise AdapterFileError(f"`{field_name}` in the adapter's config: {error}") from None
    return {name: pattern.get(name if key is None else key, default) for name, key in found.items()}, unmatched


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
            PatternMatcher([key])
        except PatternError as error:
            raise AdapterFileError(f"`{name}` in the adapter's config: {error}") from None
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
