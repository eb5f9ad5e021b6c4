"""The config that is written: PEFT's defaults left out, unknown fields dropped, what PEFT refuses refused."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, TaskType

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters.lora_config import (
    ALWAYS_WRITTEN,
    LORA_DEFAULTS,
    TASK_TYPES,
    minimal_config,
    spelled_out,
)
from lorakit.errors import AdapterFileError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def test_the_table_of_defaults_is_that_of_the_installed_peft():
    known = {}
    for field in dataclasses.fields(LoraConfig):
        factory = field.default_factory
        known[field.name] = field.default if factory is dataclasses.MISSING else factory()
    of_the_process = {"peft_version", "runtime_config"}
    assert known.keys() - of_the_process == LORA_DEFAULTS.keys(), f"PEFT {peft.__version__} has other fields"
    differing = {key for key, value in LORA_DEFAULTS.items() if known[key] != value}
    assert not differing, f"PEFT {peft.__version__} has other defaults"
    assert set(TASK_TYPES) == {task.value for task in TaskType}, f"PEFT {peft.__version__} has other task types"


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4), FisherLoRAConfig(r=4), SpecLoRAConfig(r=4), AdaLoraConfig(init_r=4, total_step=9)],
    ids=lambda config: type(config).__name__,
)
def test_defaults_and_the_fields_of_other_methods_are_left_out(config):
    written, findings = minimal_config(config.to_dict(), **PLAIN)
    assert written.keys() == set(ALWAYS_WRITTEN)
    assert findings == []
    assert LoraConfig(**written).to_dict() == LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()


def test_what_differs_from_the_defaults_is_kept():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        bias="all",
        modules_to_save=["lm_head"],
        layers_to_transform=[0, 2],
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
    )
    written, findings = minimal_config(config.to_dict())
    kept = {"lora_dropout", "bias", "modules_to_save", "layers_to_transform"}
    assert written.keys() == set(ALWAYS_WRITTEN) | kept
    assert findings == []
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert LoraConfig(**json.loads(json.dumps(written))).to_dict() == config.to_dict()


def test_fields_of_a_newer_peft_are_dropped_and_named():
    written, [finding] = minimal_config({**PLAIN, "use_quantum": True, "zeta": {}, "peft_version": "0.99"})
    assert not {"use_quantum", "zeta", "peft_version"} & written.keys()
    assert (finding.severity, finding.code) == ("warning", "unknown_config_fields")
    assert "2 fields that lorakit does not know, which are not written: use_quantum, zeta." in finding.message


INVALID = [
    ({"task_type": "4"}, "`task_type` must be null or one of CAUSAL_LM, .*; got '4'"),
    ({"use_dora": True, "lora_bias": True}, "`use_dora` and `lora_bias` cannot both be true"),
    ({"use_dora": True, "megatron_config": {"a": 1}}, "`use_dora` does not go with `megatron_config`"),
    ({"bias": "some"}, "`bias` must be none, all or lora_only; got 'some'"),
    ({"lora_dropout": 1.5}, r"`lora_dropout` must be a number in \[0, 1\]; got 1.5"),
    ({"lora_dropout": "0"}, "`lora_dropout` must be a number"),
    ({"fan_in_fan_out": "yes"}, "`fan_in_fan_out` must be true or false; got 'yes'"),
    ({"target_modules": {"q": 1}}, "`target_modules` must be names"),
    ({"target_parameters": "experts"}, "`target_parameters` must be a list of names, or null"),
    ({"kasa_config": 3}, "`kasa_config` must be an object, or null"),
    ({"revision": 1}, "`revision` must be a string, or null"),
    ({"layers_to_transform": "all"}, "`layers_to_transform` must be an integer"),
    ({"target_modules": "all-linear", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used where"),
    ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "`layers_pattern` cannot be used where"),
    ({"layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_values_that_peft_refuses_are_typed_errors(changes, message):
    with pytest.raises(AdapterFileError, match=message):
        minimal_config(PLAIN, **changes)


def test_all_problems_are_named_at_once():
    with pytest.raises(AdapterFileError, match="`task_type` .*`bias` .*`use_dora` and"):
        minimal_config(PLAIN, task_type="4", bias="some", use_dora=True, lora_bias=True)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.sampled_from(["none", "all", "CAUSAL_LM", "x"]))
FIELDS = sorted(LORA_DEFAULTS.keys() - {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"})


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_whatever_is_written_peft_loads(changes):
    try:
        written, _ = minimal_config(PLAIN, **changes)
    except AdapterFileError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT ignores fields with a warning
        warnings.filterwarnings("ignore", message="aLoRA")
        LoraConfig.from_peft_type(**json.loads(json.dumps(written)))


def test_modules_can_be_spelled_out():
    config, _ = minimal_config(
        {**PLAIN, "layers_to_transform": [1], "exclude_modules": ["k"]}, **spelled_out(["b", "a"])
    )
    assert config["target_modules"] == ["a", "b"]
    assert not {"layers_to_transform", "exclude_modules"} & config.keys()
