"""SPECLORA and FISHERLORA as members of PEFT's enum, in whatever order and however often things are imported."""

from __future__ import annotations

import copy
import importlib
import json
import pickle

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

import lorakit
from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit._registration import register_tuner
from lorakit.errors import RegistrationError

pytestmark = pytest.mark.slow

TYPES = {"SPECLORA": SpecLoRAConfig, "FISHERLORA": FisherLoRAConfig}

CHECK = """
from peft import PeftConfig, PeftType, PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
for name in ("SPECLORA", "FISHERLORA"):
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name) and member in list(PeftType), name
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name].__module__.startswith("lorakit."), name
    assert PEFT_TYPE_TO_TUNER_MAPPING[member].prefix == "lora_", name
    assert len(list(PeftType)) == len(set(PeftType)) == len(PeftType.__members__)
print("registered")
"""


@pytest.mark.parametrize("name", TYPES)
def test_members_are_true_members(name):
    member = PeftType(name)
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert member in list(PeftType)
    assert name in PeftType.__members__
    assert (member.value, member.name, str(member)) == (name, name, f"PeftType.{name}")
    assert member == name
    assert hash(member) == hash(name)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == json.dumps({"peft_type": name})
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is TYPES[name]
    assert PEFT_TYPE_TO_TUNER_MAPPING[name].__name__ == f"{TYPES[name].__name__.removesuffix('Config')}Model"
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == "lora_"


@pytest.mark.parametrize(
    "first",
    [
        "import lorakit; import peft",
        "import peft; import lorakit",
        "import lorakit; import transformers; import peft.tuners.lora",
        "import lorakit.tuners.speclora",
        "from lorakit.tuners.fisherlora import FisherLoRAConfig",
        "from lorakit import SpecLoRAConfig",
        "import lorakit, importlib; importlib.reload(lorakit); import peft; importlib.reload(lorakit)",
        "import peft, lorakit, importlib; importlib.reload(lorakit._registration); importlib.reload(lorakit)",
        "import lorakit; from peft import PeftConfig",
        "import lorakit.spectral; import lorakit; import peft, importlib; importlib.reload(peft)",
        "import peft, lorakit, importlib; importlib.reload(importlib.import_module('lorakit.tuners.speclora'))",
        # imported twice: once forgotten, by hand
        "import peft, lorakit, sys; [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('lorakit')]\n"
        "import lorakit",
        "import lorakit, peft, sys; [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('peft')]\n"
        "import peft",
    ],
)
def test_any_order_of_imports_registers(run_python, first):
    assert run_python(first + CHECK).stdout.strip() == "registered"


def test_first_imports_on_several_threads_at_once(run_python):
    code = """
        import importlib, sys, threading, random
        names = ["lorakit", "peft", "lorakit.tuners.speclora", "lorakit.tuners.fisherlora", "lorakit.surgery",
                 "lorakit.export", "lorakit"]
        random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else SEED).shuffle(names)
        errors, barrier = [], threading.Barrier(len(names))
        sys.setswitchinterval(1e-5)
        def load(name):
            barrier.wait()
            try:
                importlib.import_module(name)
            except BaseException as error:
                errors.append((name, repr(error)))
        threads = [threading.Thread(target=load, args=(name,)) for name in names]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        import lorakit
        print(errors)
    """
    for seed in range(int(__import__("os").environ.get("NSEED", "4"))):
        done = run_python(code.replace("SEED", str(seed)) + CHECK.replace("\n", "\n        "))
        assert done.stdout.split("\n")[:2] == ["[]", "registered"], done.stdout + done.stderr


@pytest.mark.parametrize("how", ["member", "mapping", "registered"])
def test_a_name_that_somebody_else_has_is_a_clear_error(run_python, how):
    code = f"""
        import peft
        from peft import LoraConfig, PeftType, PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.tuners.lora import LoraModel
        from peft.utils import register_peft_method
        class TheirConfig(LoraConfig): pass
        class TheirModel(LoraModel): pass
        how = {how!r}
        if how != "mapping":
            member = str.__new__(PeftType, "SPECLORA")
            member._name_ = member._value_ = "SPECLORA"
            PeftType._member_map_["SPECLORA"] = PeftType._value2member_map_["SPECLORA"] = member
            PeftType._member_names_.append("SPECLORA")
            type.__setattr__(PeftType, "SPECLORA", member)
        if how == "registered":
            register_peft_method(name="speclora", config_cls=TheirConfig, model_cls=TheirModel, prefix="lora_")
        if how == "mapping":
            PEFT_TYPE_TO_CONFIG_MAPPING["SPECLORA"] = TheirConfig
        before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
        try:
            import lorakit
        except RuntimeError as error:
            print(type(error).__name__, error)
        after = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
        assert "SPECLORA" not in after[0] or how != "mapping"
        assert after[1].get("SPECLORA") is before[1].get("SPECLORA")
    """
    out = run_python(code).stdout
    assert out.startswith("RegistrationError PEFT's method name 'SPECLORA' is already taken by")
    assert "Import only one of the two" in out


def test_a_registration_that_peft_refuses_leaves_nothing_behind():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)

    class WrongPrefix(PEFT_TYPE_TO_TUNER_MAPPING["SPECLORA"]):
        prefix = "other_"

    with pytest.raises(ValueError, match="Inconsistent prefixes"):
        register_tuner("halfway", SpecLoRAConfig, WrongPrefix, hotswap_keys=[])
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before
    assert not hasattr(PeftType, "HALFWAY")


def test_registering_again_changes_nothing():
    before = list(PeftType)
    module = importlib.import_module("lorakit.tuners.speclora")
    register_tuner("speclora", module.SpecLoRAConfig, module.SpecLoRAModel, hotswap_keys=["k"])
    assert list(PeftType) == before
    lorakit._registration.register_when_peft_is_imported(["lorakit.tuners.speclora", "lorakit.tuners.fisherlora"])
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPECLORA"] is SpecLoRAConfig


def test_a_foreign_class_cannot_take_our_name():
    class Theirs(SpecLoRAConfig):
        pass

    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPECLORA] = Theirs
    try:
        with pytest.raises(RegistrationError, match="already taken by .*Theirs"):
            register_tuner("speclora", SpecLoRAConfig, PEFT_TYPE_TO_TUNER_MAPPING["SPECLORA"], hotswap_keys=[])
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPECLORA] = SpecLoRAConfig


@pytest.mark.parametrize(
    "config",
    [
        SpecLoRAConfig(k=5, k_pattern={"q_proj": 3}, mode="svd", target_modules=["q_proj"], r=2),
        FisherLoRAConfig(r_q=2, r_v=8, rank_pattern={"o_proj": 3}),
        FisherLoRAConfig(),
    ],
    ids=["speclora", "fisherlora", "fisherlora-defaults"],
)
def test_configs_survive_pickle_copy_and_files(config, tmp_path):
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert type(other) is type(config)
        assert other.to_dict() == config.to_dict()
        assert other.peft_type is config.peft_type
    config.save_pretrained(tmp_path)
    for loader in (PeftConfig, type(config)):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(config)
        assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value


def test_configs_made_before_a_reload_are_still_of_their_type(run_python):
    code = """
        import importlib, lorakit, torch
        from peft import get_peft_model
        old_spec, old_fisher = lorakit.SpecLoRAConfig, lorakit.FisherLoRAConfig
        importlib.reload(lorakit.tuners.speclora)
        importlib.reload(lorakit.tuners.fisherlora)
        assert lorakit.SpecLoRAConfig is not old_spec
        assert lorakit.FisherLoRAConfig is not old_fisher
        for config in (old_spec, lorakit.SpecLoRAConfig):
            model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config(r=2, k=2, target_modules=["0"]))
            assert any("lora_spec" in name for name, _ in model.named_parameters())
        for config in (old_fisher, lorakit.FisherLoRAConfig):
            layers = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "v_proj": torch.nn.Linear(8, 8)})
            model = get_peft_model(layers, config(r=6, r_q=2))
            assert model.base_model.model["q_proj"].r["default"] == 2
        print("kept")
    """
    assert run_python(code).stdout.strip() == "kept"
