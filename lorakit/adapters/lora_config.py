"""The config of a plain LoRA as it is written: few fields, so that older PEFT and other readers load it.

PEFT is not imported: a test compares the table of defaults with the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from lorakit.errors import AdapterFileError, Finding

# PEFT 0.21's LoraConfig with its defaults, without what it writes about itself and what it never writes.
LORA_DEFAULTS: dict[str, Any] = {
    "task_type": None,
    "peft_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}
ALWAYS_WRITTEN = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "task_type")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# PEFT's version and settings of one process: they say nothing about the adapter.
_OF_THE_WRITER = {"peft_version", "runtime_config"}
# How the adapter was initialised, which a trained one no longer depends on.
_OF_THE_INIT = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# Fields of the other types that become LORA: FISHERLORA, SPECLORA, ADALORA.
_OF_OTHER_TYPES = {"r_q", "r_v", "k", "k_pattern", "mode"}
_OF_OTHER_TYPES |= {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
_OF_OTHER_TYPES |= {"total_step"}

_BOOLEANS = tuple(name for name, default in LORA_DEFAULTS.items() if isinstance(default, bool))
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")  # a string, or strings
_LISTS = ("modules_to_save", "target_parameters")
_OBJECTS = (
    *("rank_pattern", "alpha_pattern", "megatron_config", "velora_config", "monteclora_config"),
    *("use_bdlora", "arrow_config", "kasa_config", "auto_mapping"),
)


def minimal_config(raw: Mapping[str, Any], **changes: Any) -> tuple[dict[str, Any], list[Finding]]:
    """The config to write for a plain LoRA made from an adapter whose config is `raw`, with `changes` to it.

    It has `ALWAYS_WRITTEN`, and of LoraConfig's other fields those that differ from PEFT's defaults. Fields that PEFT's
    LoraConfig does not have are left out, and a finding names them.
    Raises: AdapterFileError for values that PEFT would refuse, all of them at once.

    Example:
        >>> config, findings = minimal_config({"r": 4, "lora_alpha": 8, "use_dora": False}, peft_type="LORA")
        >>> sorted(config)
        ['base_model_name_or_path', 'lora_alpha', 'peft_type', 'r', 'target_modules', 'task_type']
    """
    given = {key: _plain(value) for key, value in {**raw, **changes}.items()}
    config = {key: given.get(key, default) for key, default in LORA_DEFAULTS.items() if key not in _OF_THE_INIT}
    problems = _problems(config)
    if problems:
        raise AdapterFileError(f"The adapter's config is not one that PEFT loads: {' '.join(problems)}")
    unknown = sorted(given.keys() - LORA_DEFAULTS.keys() - _OF_THE_WRITER - _OF_OTHER_TYPES)
    findings = []
    if unknown:
        message = (
            f"The config has {len(unknown)} fields that lorakit does not know, which are not written: "
            f"{', '.join(unknown)}. A newer PEFT may compute something else with them."
        )
        findings.append(Finding("warning", "unknown_config_fields", None, message))
    written = {
        key: value
        for key, value in config.items()
        if key in ALWAYS_WRITTEN or not (value == LORA_DEFAULTS[key] or _is_empty(key, value))
    }
    return written, findings


def spelled_out(module_names: Iterable[str], parameter_names: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a config that targets these modules and parameters, by their names, and no others."""
    nothing = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    targets = {"target_modules": sorted(module_names), "target_parameters": sorted(parameter_names) or None}
    return {**targets, **nothing}


def _plain(value: Any) -> Any:
    """As JSON has it: enumerations by their values, sets as sorted lists."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value


def _is_empty(key: str, value: Any) -> bool:
    """Whether a value means the default: null where the default is an empty object, or an empty list of names."""
    return (value is None and LORA_DEFAULTS[key] == {}) or (value == [] and LORA_DEFAULTS[key] is None)


def _problems(config: Mapping[str, Any]) -> list[str]:
    """What PEFT would refuse, one sentence each."""
    found = [*_wrong_values(config), *_wrong_combinations(config)]
    return [f"{text}." for text in found]


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    found = []

    def require(name: str, fits: bool, wanted: str) -> None:
        if not fits:
            shown = repr(config[name])
            found.append(f"`{name}` must be {wanted}; got {shown if len(shown) <= 60 else f'{shown[:57]}...'}")

    task = config["task_type"]
    require("task_type", task is None or task in TASK_TYPES, f"null or one of {', '.join(TASK_TYPES)}")
    require("bias", config["bias"] in ("none", "all", "lora_only"), "none, all or lora_only")
    dropout = config["lora_dropout"]
    number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    require("lora_dropout", number and 0 <= dropout <= 1, "a number in [0, 1]")
    for name in _BOOLEANS:
        fits = isinstance(config[name], bool)
        if name == "init_lora_weights":
            fits = fits or isinstance(config[name], str)
        require(name, fits, "true or false")
    for name in _NAMES:
        require(name, config[name] is None or isinstance(config[name], str) or _strings(config[name]), "names")
    for name in _LISTS:
        require(name, config[name] is None or _strings(config[name]), "a list of names, or null")
    for name in _OBJECTS:
        require(name, config[name] is None or isinstance(config[name], Mapping), "an object, or null")
    for name in ("base_model_name_or_path", "revision"):
        require(name, config[name] is None or isinstance(config[name], str), "a string, or null")
    layers = config["layers_to_transform"]
    fits = layers is None or _is_integer(layers) or (isinstance(layers, list) and all(map(_is_integer, layers)))
    require("layers_to_transform", fits, "an integer, a list of integers, or null")
    return found


def _wrong_combinations(config: Mapping[str, Any]) -> list[str]:
    found = []
    if config["use_dora"] is True and config["lora_bias"] is True:
        found.append("`use_dora` and `lora_bias` cannot both be true")
    if config["use_dora"] is True and config["megatron_config"]:
        found.append("`use_dora` does not go with `megatron_config`")
    if isinstance(config["target_modules"], str):
        found += [
            f"`{name}` cannot be used where `target_modules` is a string"
            for name in ("layers_to_transform", "layers_pattern")
            if config[name] is not None
        ]
    elif config["layers_pattern"] and config["layers_to_transform"] is None:
        found.append("`layers_pattern` needs `layers_to_transform`")
    return found


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
