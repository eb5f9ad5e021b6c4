"""Edits: what they write, that they are whole or not at all, and that they can be undone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random

import numpy as np
import pytest
import torch
from closeness import assert_close_outputs
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters.edit_log import read_edits
from lorakit.adapters.in_model import live_modules
from lorakit.errors import CalibrationError, SurgeryError
from lorakit.surgery import POLICIES, AbsSelect, SmoothAbs, reweight, sensitivity
from lorakit.surgery import _edit as implementation


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


def everything(model):
    """All that a failed edit must leave alone, beside the tensors."""
    return (
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [
            (name, m.training, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        ],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        model.active_adapters,
        model.config.use_cache,
        sorted(vars(model.peft_config["default"])),
        type(model.peft_config["default"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("energy", ["l1", "l2", "none"])
def test_the_written_spectrum_is_the_reported_one_with_the_same_singular_vectors(adapted, batches, policy, energy):
    model = adapted()
    modules = {m.name: m for m in live_modules(model, "default")}
    before = {name: m.factors().dense().double() for name, m in modules.items()}
    report = reweight(model, batches(), policy=policy, preserve_energy=energy, progress=False)
    rows = report.to_dict()["modules"]
    assert [row["module_name"] for row in rows] == [m.name for m in modules.values() if m.role in ("output", "down")]
    for row in rows:
        old = before[row["module_name"]]
        U, S, Vh = torch.linalg.svd(old, full_matrices=False)
        U, S, Vh = U[:, :4], S[:4], Vh[:4]
        assert row["singular_values"] == pytest.approx(S.tolist(), rel=1e-5)
        edited = torch.tensor(row["edited_singular_values"], dtype=torch.float64)
        new = modules[row["module_name"]].factors().dense().double()
        assert torch.allclose(new, U * edited @ Vh, atol=1e-5 * float(S[0]))
        scale = row["energy_scale"]
        gated = [gate * sigma * scale for gate, sigma in zip(row["gate"], row["singular_values"], strict=True)]
        assert row["edited_singular_values"] == pytest.approx(gated, rel=1e-9)
        if energy != "none":
            order = 1 if energy == "l1" else 2
            assert float(edited.norm(order)) == pytest.approx(float(S.norm(order)), rel=1e-5)
        else:
            assert scale == pytest.approx(1.0)
    for name, module in modules.items():
        if module.role not in ("output", "down"):
            assert torch.equal(module.factors().dense().double(), before[name])


def test_the_policy_sees_the_reported_numbers(adapted, batches):
    model = adapted()
    seen = []

    class Halve:
        aggregate = "abs_mean"

        def __call__(self, singular_values, sensitivity, *, generator):
            seen.append((singular_values.tolist(), sensitivity.tolist()))
            return singular_values * torch.tensor([0.5, 1, 1, 1], dtype=torch.float64)

    report = reweight(model, batches(), policy=Halve(), preserve_energy=None, progress=False)
    assert report.aggregate == "abs_mean"
    assert report.policy == "Halve"
    for row, (sigma, g) in zip(report.modules, seen, strict=True):
        assert (row.singular_values, row.sensitivity) == (sigma, g)
        assert row.gate == pytest.approx([0.5, 1, 1, 1])


@pytest.mark.slow
def test_aggregate_is_what_the_policy_needs_unless_given(adapted, batches):
    assert reweight(adapted(), batches(), progress=False).aggregate == "mean_abs"
    assert reweight(adapted(), batches(), policy="grad_direction", progress=False).aggregate == "mean"
    given = reweight(adapted(), batches(), policy="abs_select", aggregate="abs_mean", progress=False)
    assert given.aggregate == "abs_mean"
    signed = sensitivity(adapted(), batches(), aggregate="mean", progress=False)
    assert given.modules[0].sensitivity == pytest.approx([abs(g) for g in signed.modules[0].sensitivity])


@pytest.mark.slow
def test_policy_parameters_and_seeds(adapted, batches):
    model = adapted()
    report = reweight(
        model, batches(), policy=AbsSelect(core_frac=0.5, amp=2.0), preserve_energy="none", progress=False
    )
    assert sorted(np.round(report.modules[0].gate, 6)) == [0.8, 1.0, 2.0, 2.0]
    assert report.policy_parameters["core_frac"] == 0.5
    gates = []
    for seed in (0, 0, 1):
        gates.append(
            [
                np.round(row.gate, 6).tolist()
                for row in reweight(adapted(), batches(), policy="random_index", seed=seed, progress=False).modules
            ]
        )
    assert gates[0] == gates[1] != gates[2]


def test_undo_restores_every_bit(adapted, batches, token_ids):
    model = adapted()
    before, expected = state_of(model), model(input_ids=token_ids).logits
    edit = reweight(model, batches(), progress=False)
    assert not same_state(model, before)
    edit.undo()
    assert same_state(model, before)
    assert_close_outputs(model(input_ids=token_ids).logits, expected)
    with pytest.raises(ValueError, match="no longer those that this edit wrote"):
        edit.undo()


def test_edits_are_undone_in_reverse(adapted, batches):
    model = adapted()
    before = state_of(model)
    first = reweight(model, batches(), policy="abs_select", progress=False)
    between = state_of(model)
    second = reweight(model, batches(), policy="random_index", progress=False)
    after = state_of(model)
    with pytest.raises(ValueError, match="undo later edits first"):
        first.undo()
    assert same_state(model, after)
    second.undo()
    assert same_state(model, between)
    first.undo()
    assert same_state(model, before)


def test_undo_refuses_to_lose_training(adapted, batches):
    model = adapted()
    edit = reweight(model, batches(), progress=False)
    with torch.no_grad():
        live_modules(model, "default")[3].up.weight.add_(1e-3)
    changed = state_of(model)
    with pytest.raises(ValueError, match="later training would be lost"):
        edit.undo()
    assert same_state(model, changed)


def test_stored_dtypes_ranks_and_parameter_objects_stay(adapted, batches):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        config = LoraConfig(r=40, target_modules=["o_proj", "down_proj"])  # more than the smaller side, 32
        model = adapted(config, dtype=dtype)
        ids = {name: id(p) for name, p in model.named_parameters()}
        shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        edit = reweight(model, batches(), policy="abs_select", progress=False)
        assert {name: id(p) for name, p in model.named_parameters()} == ids
        assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == shapes
        for row, module in zip(edit.modules, live_modules(model, "default"), strict=True):
            written = sorted(module.factors().singular_values().tolist(), reverse=True)
            wanted = sorted(row.edited_singular_values, reverse=True)
            assert written[: len(wanted)] == pytest.approx(
                wanted, rel=0.02 if dtype == torch.bfloat16 else 1e-4, abs=0.02 if dtype == torch.bfloat16 else 1e-5
            )
        edit.undo()


def test_an_edit_that_changes_nothing_writes_nothing(adapted, batches):
    class Same:
        aggregate = "mean"

        def __call__(self, singular_values, sensitivity, *, generator):
            return singular_values

    model = adapted()
    before = state_of(model)
    reweight(model, batches(), policy=Same(), progress=False)
    assert same_state(model, before)


@pytest.mark.parametrize(
    "config",
    [
        FisherLoRAConfig(r=4, r_q=2, target_modules="all-linear"),
        SpecLoRAConfig(r=4, k=8, target_modules="all-linear"),
    ],
)
def test_other_tuners_and_their_masks_do_not_change(adapted, batches, config):
    model = adapted(config)
    before = state_of(model)
    edit = reweight(model, batches(), progress=False)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora_A" in key or "lora_B" in key for key in changed)
    edit.undo()
    assert same_state(model, before)


def test_only_the_named_adapter_is_edited(adapted, batches, randomize):
    model = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("b")
    randomize(model)
    model.set_adapter("default")
    before = state_of(model)
    reweight(model, batches(), adapter_name="b", progress=False)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(".b." in key for key in changed)
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="`adapter_name` is needed unless exactly one adapter is active"):
        reweight(model, batches(), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        lambda: SpecLoRAConfig(r=4, k=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        lambda: FisherLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ],
)
def test_a_saved_edit_has_its_record_beside_it_and_loads_as_before(
    adapted, batches, token_ids, tmp_path, tiny_llama, make
):
    model = adapted(make())
    first = reweight(model, batches(), policy="abs_select", progress=False)
    second = reweight(model, batches(), policy=SmoothAbs(), seed=5, progress=False)
    second.save(tmp_path / "two", previous=[first])
    record = json.loads((tmp_path / "two" / "lorakit_surgery.json").read_text())
    assert [edit["policy"] for edit in record["edits"]] == ["abs_select", "SmoothAbs"]
    assert [edit["edit_id"] for edit in record["edits"]] == [first.edit_id, second.edit_id]
    edit = record["edits"][1]
    assert (edit["num_examples"], edit["aggregate"], edit["seed"], edit["preserve_energy"]) == (7, "mean_abs", 5, "l1")
    assert edit["modules"][0]["edited_singular_values"] == pytest.approx(
        second.modules[0].edited_singular_values, rel=1e-5
    )
    assert type(model.peft_config["default"]) is type(make())
    assert not any("lorakit" in key for key in vars(model.peft_config["default"]))
    model.eval()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "two").eval()
    assert type(loaded.peft_config["default"]) is type(make())
    assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)

    third = reweight(loaded, batches(), policy="random_index", progress=False)
    third.save(tmp_path / "two", previous=read_edits(tmp_path / "two"))
    policies = [edit["policy"] for edit in read_edits(tmp_path / "two")]
    assert policies == ["abs_select", "SmoothAbs", "random_index"]
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "lorakit_surgery.json").exists()


def test_an_edit_is_saved_only_while_its_factors_are_in_the_model(adapted, batches, tmp_path):
    model = adapted()
    first = reweight(model, batches(), progress=False)
    second = reweight(model, batches(), policy="abs_select", progress=False)
    with pytest.raises(SurgeryError, match="save the last edit, with the others as `previous`"):
        first.save(tmp_path / "out")
    second.undo()
    with pytest.raises(SurgeryError, match="no longer those that this edit wrote"):
        second.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first.save(tmp_path / "out")
    assert [edit["edit_id"] for edit in read_edits(tmp_path / "out")] == [first.edit_id]


def test_an_adapter_of_any_name_is_saved_in_the_directory_itself(adapted, batches, tmp_path, randomize, tiny_llama):
    model = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("b")
    randomize(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    edit = reweight(model, batches(), progress=False)
    edit.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "lorakit_surgery.json", "notes.txt"} <= names
    assert "b" not in names
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    wanted = {m.name: m.factors().dense() for m in live_modules(model, "b")}
    for module in live_modules(loaded, "default"):
        assert torch.equal(module.factors().dense(), wanted[module.name])


def test_a_save_that_fails_leaves_the_directory_as_it_was(adapted, batches, tmp_path, monkeypatch):
    model = adapted()
    edit = reweight(model, batches(), progress=False)
    edit.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(implementation, "write_edits", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        edit.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_under_inference_mode_the_edit_is_the_same(adapted, batches):
    expected, model = adapted(), adapted()
    before = state_of(model)
    wanted = reweight(expected, batches(), progress=False)
    with torch.inference_mode():
        inside = [{key: value.clone() for key, value in batch.items()} for batch in batches()]
        edit = reweight(model, inside, progress=False)
    assert same_state(model, state_of(expected))
    assert edit.to_dict()["modules"] == wanted.to_dict()["modules"]
    with torch.inference_mode():
        edit.undo()
    assert same_state(model, before)
    model(**batches()[0]).loss.backward()  # and the factors can still be trained
    with torch.inference_mode():
        made_inside = copy.deepcopy(model)
    with pytest.raises(CalibrationError, match=r"made under torch.inference_mode\(\)"):
        reweight(made_inside, batches(), progress=False)


def test_a_loss_that_does_not_depend_on_the_adapter_is_an_error(adapted, batches):
    model = adapted()
    before = state_of(model)

    def ignores_the_model(model, batch):
        return torch.zeros(len(batch["labels"]), requires_grad=True) * 1.0

    with pytest.raises(CalibrationError, match=r"gradient of exactly 0 at each of the 4 .*`loss_fn` does not use"):
        reweight(model, batches(), loss_fn=ignores_the_model, progress=False)
    assert same_state(model, before)


def test_factors_that_are_not_finite_are_named(adapted, batches):
    model = adapted()
    with torch.no_grad():
        live_modules(model, "default")[3].up.weight[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"The factors of 'model.layers.0.self_attn.o_proj' have NaN"):
        reweight(model, batches(), progress=False)


def test_the_report_of_an_edit(adapted, batches):
    edit = reweight(adapted(), batches(), policy="abs_select", progress=False)
    assert edit.headline == "LlamaForCausalLM, adapter 'default': abs_select edited 4 modules, 7 examples"
    assert edit.details[0] == "gates from 0.800 to 1.250"
    assert edit.details[-1] == "1 examples without labels were left out"
    json.dumps(edit.to_dict(), allow_nan=False)
    frame = edit.to_frame()
    assert len(frame) == 16  # 4 modules of 4 components
    assert list(frame.columns)[:3] == ["module_name", "role", "component"]
    expected = frame.singular_value * frame.gate
    scale = [row.energy_scale for row in edit.modules for _ in row.gate]
    np.testing.assert_allclose(frame.edited_singular_value, expected * scale, rtol=1e-9)
    assert len(repr(edit).splitlines()) <= 10
    figure = edit.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["output", "down"] * 2
    assert "adapter 'default'" in figure.get_suptitle()
    shown = np.concatenate([axes.images[0].get_array().flatten() for axes in figure.axes[2:4]])
    assert sorted(np.round(shown, 6)) == sorted(np.round(frame.gate, 6))


@pytest.mark.slow
def test_the_next_steps_run(adapted, batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    measured = sensitivity(model, batches(), progress=False)
    names = {"model": model, "loader": batches()}
    exec("\n".join(measured.next_steps), names)
    exec("\n".join(names["edit"].next_steps), names)
    assert (tmp_path / "edited-adapter" / "lorakit_surgery.json").exists()
    assert names["control"].policy == "random_index"
    assert names["control"].next_steps == ('edit.save("edited-adapter/")', "edit.undo()")


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loader", "model", "backward", "loss_fn", "policy", "write"])
def test_whatever_fails_leaves_everything_as_it_was(adapted, batches, where, error, monkeypatch, token_ids):
    model = adapted(LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3))
    model.train()
    model.get_base_model().model.layers[0].mlp.eval()  # modes need not be uniform
    next(iter(model.parameters())).requires_grad_(True)
    options = {}
    calls = {"n": 0}

    def fail_second(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 2:
            torch.rand(3), random.random(), np.random.rand()
            raise error("here")

    def loader():
        for batch in batches(3):
            torch.rand(1), random.random(), np.random.rand()
            if where == "loader":
                fail_second()
            yield batch

    if where == "model":
        model.get_base_model().lm_head.register_forward_pre_hook(fail_second)
    if where == "backward":
        model.get_base_model().model.norm.register_full_backward_hook(fail_second)
    if where == "loss_fn":

        def loss_fn(m, batch):
            fail_second()
            return torch.stack(
                [
                    m(**{k: v[i : i + 1] for k, v in batch.items() if k != "labels"}).logits.mean()
                    for i in range(len(batch["input_ids"]))
                ]
            )

        options["loss_fn"] = loss_fn
    if where == "policy":

        class Failing(AbsSelect):
            def __call__(self, *args, **kwargs):
                fail_second()
                return super().__call__(*args, **kwargs)

        options["policy"] = Failing()
    if where == "write":
        write = implementation.write_weight

        def write_weight(module, value):
            if calls["n"] < 2:
                fail_second()
            write(module, value)

        monkeypatch.setattr(implementation, "write_weight", write_weight)
    before, state = everything(model), state_of(model)
    with pytest.raises(error, match="here"):
        reweight(model, loader(), progress=False, **options)
    assert everything(model) == before
    assert same_state(model, state)


def test_an_edit_changes_nothing_but_the_factors(adapted, batches):
    model = adapted()
    model.train()
    before = everything(model)
    reweight(model, batches(), progress=False)
    after = everything(model)
    assert after == before


@pytest.mark.slow
def test_an_unusable_result_of_a_policy_is_an_error(adapted, batches):
    class Bad:
        aggregate = "mean"

        def __init__(self, result):
            self.result = result

        def __call__(self, singular_values, sensitivity, *, generator):
            return self.result

    for result in (None, torch.ones(3), torch.tensor([1.0, float("nan"), 1, 1]), torch.full((4,), float("inf"))):
        model = adapted()
        before = state_of(model)
        with pytest.raises(ValueError, match="The policy must return 4 finite singular values for 'model.layers.0"):
            reweight(model, batches(), policy=Bad(result), progress=False)
        assert same_state(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "best"}, ValueError, "`policy` must be one of abs_select"),
        ({"policy": AbsSelect}, TypeError, "`policy` must be a name or an object"),
        ({"aggregate": "median"}, ValueError, "`aggregate` must be one of mean_abs, mean, abs_mean; got 'median'"),
        ({"preserve_energy": "l3"}, ValueError, "`preserve_energy` must be one of l1, l2, none; got 'l3'"),
        ({"num_examples": 0}, ValueError, "`num_examples` must be a positive integer; got 0"),
        ({"adapter_name": "x"}, ValueError, r"`adapter_name` must be one of \['default'\]; got 'x'"),
        (
            {"target_modules": ["w_proj"]},
            ValueError,
            r"no module that matches target_modules=\['w_proj'\].* 14 modules named \['down_proj', 'gate_proj'",
        ),
        ({"target_modules": "(["}, ValueError, "`target_modules` must be a list of names or a regular expression; "),
        ({"loader": []}, ValueError, "yielded no batch"),
        (
            {"loader": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]},
            ValueError,
            r"must yield mappings with labels .* got keys \['input_ids'\]",
        ),
        ({"loader": [torch.ones(1, 3)]}, ValueError, "must yield mappings with labels .* got Tensor"),
        (
            {"loader": [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.full((2, 3), -100)}]},
            ValueError,
            "None of the 2 examples looked at has a label",
        ),
        (
            {
                "loader": [
                    {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([[1, -100, -100]] * 2)}
                ]
            },
            ValueError,
            "None of the 2 examples looked at has a label",
        ),
        (
            {"loss_fn": lambda model, batch: torch.tensor(1.0)},
            ValueError,
            r"must return one loss per example, a tensor of shape \(n,\); got shape \(\)",
        ),
        ({"loss_fn": lambda model, batch: torch.tensor([1.0, float("nan")])}, ValueError, "losses that are not finite"),
        ({"loss_fn": lambda model, batch: 3.0}, ValueError, "must return one loss per example.* got float"),
    ],
)
def test_bad_input_is_a_typed_error_and_changes_nothing(adapted, batches, options, error, message):
    model = adapted()
    before, state = everything(model), state_of(model)
    options = {"loader": batches()} | options
    with pytest.raises(error, match=message):
        reweight(model, options.pop("loader"), progress=False, **options)
    assert everything(model) == before
    assert same_state(model, state)


def test_a_loss_that_is_not_the_examples_mean_asks_for_a_loss_function(adapted, batches):
    model = adapted()
    base = model.get_base_model()
    forward = base.forward

    def with_auxiliary_loss(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.loss = outputs.loss + 0.01
        return outputs

    base.forward = with_auxiliary_loss
    with pytest.raises(ValueError, match=r"is not the mean of its examples' losses.*Pass `loss_fn\(model, batch\)`"):
        reweight(model, batches(), progress=False)


def test_a_loss_that_is_nan_says_so(adapted, batches):
    model = adapted()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss on a calibration batch is nan, although the batch has labels"):
        reweight(model, batches(), progress=False)


@pytest.mark.slow
def test_models_and_adapters_of_other_kinds_are_refused(tiny_llama, adapted, batches, randomize):
    with pytest.raises(TypeError, match="`adapter` must be a peft.PeftModel; got LlamaForCausalLM"):
        reweight(tiny_llama(), batches())
    with pytest.raises(TypeError, match="Pass its `.module`"):
        reweight(nn.DataParallel(adapted()), batches())
    with pytest.raises(ValueError, match="is of type ADALORA; supported are LORA, FISHERLORA, SPECLORA"):
        reweight(get_peft_model(tiny_llama(), AdaLoraConfig(target_modules=["o_proj"], total_step=10)), batches())
    with pytest.raises(ValueError, match="is of type IA3"):
        reweight(get_peft_model(tiny_llama(), IA3Config(target_modules=["o_proj"], feedforward_modules=[])), batches())
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.o_proj' uses DoRA"):
        reweight(adapted(LoraConfig(r=4, target_modules=["o_proj"], use_dora=True)), batches())
    with pytest.raises(ValueError, match="'model.embed_tokens' is a layer of type Embedding"):
        reweight(
            adapted(LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"])),
            batches(),
            target_modules=["embed_tokens"],
        )
    conv = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="'0' is a layer of type Conv2d"):
        reweight(conv, batches(), target_modules=["0"])
    with pytest.raises(ValueError, match=r"no module that writes to the residual stream.*named \['q_proj', 'v_proj'\]"):
        reweight(adapted(LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), batches())
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapters \['default'\] are merged into .* Call unmerge_adapter\(\) first"):
        reweight(merged, batches())
    disabled = adapted()
    with disabled.disable_adapter(), pytest.raises(ValueError, match="are disabled. Enable them first"):
        reweight(disabled, batches())


@pytest.mark.slow
def test_surgery_on_an_offloaded_adapter_edits_what_is_offloaded(adapted, batches, token_ids):
    from accelerate import cpu_offload

    expected = adapted()
    reweight(expected, batches(), progress=False)
    model = adapted()
    before = model(input_ids=token_ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    edit = reweight(model, batches(), progress=False)
    assert torch.allclose(model(input_ids=token_ids).logits, expected(input_ids=token_ids).logits, atol=1e-5)
    edit.undo()
    assert_close_outputs(model(input_ids=token_ids).logits, before)


def test_progress_goes_to_stderr_alone(adapted, batches, capfd):
    reweight(adapted(), batches(), progress=True)
    assert capfd.readouterr().out == ""


def test_an_untrained_adapter_is_left_alone_and_listed(tiny_llama, batches):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["o_proj"]))
    before = state_of(model)
    with pytest.warns(UserWarning, match="The updates of all 2 selected modules are zero"):
        report = reweight(model, batches(), progress=False)
    assert report.zero_modules == [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    assert (report.modules, report.num_examples) == ([], 7)
    assert same_state(model, before)


class TwoBranches(nn.Module):
    """One branch reaches the loss, the other runs for nothing, and a third does not run."""

    def __init__(self):
        super().__init__()
        self.used, self.ignored, self.asleep = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.config = {"model_type": "custom"}

    def forward(self, x, labels):
        self.ignored(x)
        return {"loss": nn.functional.mse_loss(self.used(x), labels), "logits": self.used(x)}


def test_modules_that_do_not_matter_are_left_alone_and_listed(randomize):
    model = randomize(get_peft_model(TwoBranches(), LoraConfig(r=2, target_modules=["used", "ignored", "asleep"])))
    batch = {"x": torch.randn(3, 8), "labels": torch.randn(3, 8)}
    before = state_of(model)
    report = reweight(model, [batch], target_modules="all-linear", policy="abs_select", progress=False)
    assert [row.module_name for row in report.modules] == ["used"]
    assert report.idle_modules == ["ignored", "asleep"]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(".used." in key for key in changed)


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_attention_and_experts_are_refused(randomize, batches):
    attention = randomize(get_peft_model(WithAttention(), LoraConfig(r=2, target_modules=["attn"])))
    with pytest.raises(ValueError, match="'attn' is a layer of type MultiheadAttention"):
        reweight(attention, batches(), target_modules=["attn"])
    from transformers import MixtralConfig, MixtralForCausalLM

    small = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=2,
    )
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    experts = randomize(get_peft_model(MixtralForCausalLM(small), config))
    with pytest.raises(ValueError, match=r"1 adapted parameters .*model\.layers\.0\.mlp\.experts\.down_proj"):
        reweight(experts, batches(), target_modules=".*experts.*")


def test_losses_without_gradients_are_refused(adapted, batches):
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="losses without gradients. They must depend on the model"):
        reweight(model, batches(2), loss_fn=lambda m, b: m(**b).loss.repeat(2).detach(), progress=False)
    assert same_state(model, before)


def test_undo_is_refused_while_merged_and_after_deletion(adapted, batches):
    model = adapted()
    edit = reweight(model, batches(), progress=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged into .* Call unmerge_adapter\(\) first"):
        edit.undo()
    model.unmerge_adapter()
    model.add_adapter("b", LoraConfig(target_modules=["o_proj"]))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="Adapter 'default' is no longer in"):
        edit.undo()


def test_undo_is_whole_or_not_at_all(adapted, batches, monkeypatch):
    model = adapted()
    original = state_of(model)
    edit = reweight(model, batches(), progress=False)
    edited = state_of(model)
    write, calls = implementation.write_weight, []

    def interrupted(module, value):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(module, value)

    monkeypatch.setattr(implementation, "write_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit.undo()
    assert same_state(model, edited)
    monkeypatch.undo()
    edit.undo()
    assert same_state(model, original)


def test_a_record_of_any_policy_can_be_saved_and_has_the_hash_of_its_weights(adapted, batches, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Weighted:
        weights: torch.Tensor = dataclasses.field(
            default_factory=lambda: torch.tensor([2.0, 1, 1, 1], dtype=torch.float64)
        )
        aggregate = "mean"

        def __call__(self, singular_values, sensitivity, *, generator):
            return singular_values * self.weights

    edit = reweight(adapted(), batches(), policy=Weighted(), progress=False)
    edit.save(tmp_path)
    record = json.loads((tmp_path / "lorakit_surgery.json").read_text())
    assert record["edits"][0]["policy"] == "Weighted"
    assert record["edits"][0]["policy_parameters"]["weights"].startswith("tensor([2., 1., 1., 1.]")
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_results_too_large_for_the_stored_dtype_are_refused(adapted, batches):
    class Huge:
        aggregate = "mean"

        def __call__(self, singular_values, sensitivity, *, generator):
            return singular_values * 1e300

    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="are too large for torch.float32"):
        reweight(model, batches(), policy=Huge(), preserve_energy="none", progress=False)
    assert same_state(model, before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1"])
def test_unusable_seeds(adapted, batches, seed):
    with pytest.raises(ValueError, match=r"`seed` must be an integer from 0 to 2\*\*63 - 1; got"):
        reweight(adapted(), batches(), seed=seed, progress=False)


def test_seeds_of_any_integer_type(adapted, batches):
    assert reweight(adapted(), batches(), policy="random_index", seed=np.int64(3), progress=False).seed == 3
