"""What a config gives each module, all of them at once; PEFT's own rule is the reference."""

from __future__ import annotations

import math
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.adapters import parse
from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.read import TensorDict

NAMES = [f"model.layers.{i}.{leaf}" for i in (0, 1, 10) for leaf in ("q_proj", "v_proj", "mlp.up_proj")]
KEYS = st.sampled_from(["q_proj", r"layers\.1\..*", "^model.layers.0.q_proj", "k_proj", "up_proj|v_proj", *NAMES])


@pytest.mark.slow
@given(
    ranks=st.dictionaries(KEYS, st.integers(1, 64)),
    alphas=st.dictionaries(KEYS, st.floats(0.5, 64)),
    use_rslora=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_ranks_and_scalings_are_those_of_peft(ranks, alphas, use_rslora):
    config = AdapterSettings.from_config(
        {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 12,
            "use_rslora": use_rslora,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
    )
    resolved = config.resolve(NAMES)
    assert list(resolved.modules) == NAMES
    for name, module in resolved.modules.items():
        r = ranks.get(get_pattern_key(ranks, name), 8)
        alpha = alphas.get(get_pattern_key(alphas, name), 12)
        assert module.rank == r
        assert module.scaling == pytest.approx(alpha / (math.sqrt(r) if use_rslora else r))
    expected = [
        (field, key)
        for field, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas))
        for key in pattern
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in NAMES)
    ]
    assert list(resolved.unmatched) == expected


def test_without_a_config_ranks_are_unknown_and_scalings_1():
    resolved = AdapterSettings().resolve(NAMES)
    assert {(module.rank, module.scaling) for module in resolved.modules.values()} == {(None, 1.0)}
    assert resolved.unmatched == ()


def test_adalora_s_masks_give_ranks():
    mask = {f"{NAMES[0]}.lora_E": [True, False, True], "gone.lora_E": [True] * 3}
    config = AdapterSettings.from_config({"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6, "rank_pattern": mask})
    resolved = config.resolve(NAMES[:2])
    assert [module.rank for module in resolved.modules.values()] == [2, 3]
    assert {module.scaling for module in resolved.modules.values()} == {6 / (3 + 1e-5)}
    assert resolved.unmatched == (("rank_pattern", "gone.lora_E"),)


def test_an_adapter_is_parsed_in_one_pass(monkeypatch):
    """The config is resolved once for all modules, and each name is looked at once for its role and layer."""
    tensors = {f"{name}.lora_{half}.weight": torch.ones(2, 2) for name in NAMES for half in "AB"}
    config = AdapterSettings.from_config({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    seen: dict[str, list[object]] = {"resolve": [], "role_of": [], "layer_of": []}

    def counted(function, name):
        return lambda *arguments: seen[name].append(arguments[-1]) or function(*arguments)

    monkeypatch.setattr(AdapterSettings, "resolve", counted(AdapterSettings.resolve, "resolve"))
    for name in ("role_of", "layer_of"):
        monkeypatch.setattr(parse, name, counted(getattr(parse, name), name))
    adapter = parse.assemble("memory", config, TensorDict(tensors))
    for module in adapter.modules:
        _ = module.role, module.layer, module.group, module.scaling
    assert [(m.role, m.layer, m.group) for m in adapter.modules[:3]] == [
        ("up", 0, "up"), ("query", 0, "query"), ("value", 0, "value"),
    ]  # fmt: skip
    assert len(seen["resolve"]) == 1
    assert sorted(map(str, seen["role_of"])) == sorted(map(str, seen["layer_of"])) == sorted(NAMES)


@pytest.mark.slow
def test_the_time_to_parse_grows_linearly():
    """Also with a pattern that has an entry for every module."""

    def seconds(count):
        names = [f"model.layers.{i}.mlp.down_proj" for i in range(count)]
        half = torch.ones(2, 2)
        source = TensorDict({f"{name}.lora_{part}.weight": half for name in names for part in "AB"})
        pattern = {f"^{name}": 2 for name in names}
        start = time.process_time()
        config = AdapterSettings.from_config(
            {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "rank_pattern": pattern, "alpha_pattern": pattern}
        )
        adapter = parse.assemble("memory", config, source)
        assert len(adapter.modules) == count
        assert adapter.findings == ()
        return time.process_time() - start

    small = min(seconds(500) for _ in range(3))
    assert seconds(8000) < 64 * small  # 16 at best, 256 if quadratic
