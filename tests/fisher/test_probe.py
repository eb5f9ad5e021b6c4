"""The Fisher probe against one backward per example, and that it leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from closeness import assert_close_reports
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.allocation import ranks_from_probe
from lorakit.errors import AllocationError, CalibrationError, UnsupportedModelError
from lorakit.fisher import FisherReport, FisherRow, Moments, probe
from lorakit.fisher._probe import CPU_TOKENS

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
LENGTHS = (7, 5, 9, 3, 6)


def text_examples(seed=0, lengths=LENGTHS):
    """Examples of different lengths, whose first labels are of a prompt and do not count."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(1, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def padded(examples, size, side="right", extra=0):
    """Batches of `size`, padded to the longest of each batch and by `extra` more."""
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        width = max(len(e["input_ids"]) for e in part) + extra
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for e in part:
            pad = width - len(e["input_ids"])
            around = (0, pad) if side == "right" else (pad, 0)
            batch["input_ids"].append(nn.functional.pad(e["input_ids"], around))
            batch["attention_mask"].append(nn.functional.pad(torch.ones_like(e["input_ids"]), around))
            batch["labels"].append(nn.functional.pad(e["labels"], around, value=-100))
        batches.append({key: torch.stack(value) for key, value in batch.items()})
    return batches


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def one_backward_each(adapted, examples, names, kind="lora_B"):
    """F per module, mean over entries, and that per example: autograd's gradient of each example's own loss."""
    base = adapted.get_base_model()
    weights = []
    for name in names:
        layer = layers_of(base)[name]
        weights.append(layer.base_layer.weight if kind == "weight" else getattr(layer, kind)["default"].weight)
    flags = [w.requires_grad for w in weights]
    for weight in weights:
        weight.requires_grad_(True)
    rows = []
    for example in examples:
        loss = adapted(**{k: v.unsqueeze(0) for k, v in example.items()}).loss
        rows.append([g**2 for g in torch.autograd.grad(loss, weights)])
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


def make(kind, tiny_llama, tiny_gpt2):
    torch.manual_seed(1)
    if kind == "llama":
        return tiny_llama(torch.float64), ["q_proj", "v_proj", "o_proj", "down_proj"], text_examples()
    if kind == "gpt2":
        return tiny_gpt2(torch.float64), ["c_attn", "c_proj"], text_examples()
    if kind == "bert":
        base = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))
        examples = [e | {"labels": torch.tensor(i % 3)} for i, e in enumerate(text_examples(lengths=(6,) * 5))]
        return base.double().eval(), ["query", "value"], examples
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))
    return base.double().eval(), ["q", "v", "wo"], text_examples()


def batches_of(kind, examples, size, **options):
    if kind != "bert":
        return padded(examples, size, **options)
    stacked = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    count = math.ceil(len(examples) / size)
    return [{k: v[i * size : (i + 1) * size] for k, v in stacked.items()} for i in range(count)]


def adapt(base, targets, randomize):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    return randomize(get_peft_model(base, config)).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_it_is_one_backward_per_example(kind, tiny_llama, tiny_gpt2, randomize):
    base, targets, examples = make(kind, tiny_llama, tiny_gpt2)
    adapted = adapt(base, targets, randomize)
    names = list(layers_of(adapted.get_base_model()))
    expected = {f: one_backward_each(adapted, examples, names, f) for f in ("lora_B", "lora_A", "weight")}
    for size in (1, 2, 5):
        report = probe(adapted, batches_of(kind, examples, size), factors=["A", "weight"], progress=False)
        assert [row.module_name for row in report.modules] == names
        assert report.num_examples == 5
        for row in report.modules:
            B, A, W = (expected[f][row.module_name] for f in ("lora_B", "lora_A", "weight"))
            W = W.mT if kind == "gpt2" else W  # Conv1D stores (d_in, d_out)
            moments = report.moments[row.module_name]
            torch.testing.assert_close(moments.per_example, B.mean((1, 2)), rtol=1e-6, atol=0)
            assert row.fisher == pytest.approx(float(B.mean()), rel=1e-6)
            assert row.stderr == pytest.approx(float(B.mean((1, 2)).std() / math.sqrt(5)), rel=1e-6)
            assert row.factor_a.value == pytest.approx(float(A.mean()), rel=1e-6)
            assert row.weight.value == pytest.approx(float(W.mean()), rel=1e-6)
            torch.testing.assert_close(moments.weight_rows, W.mean(0).sum(1), rtol=1e-5, atol=1e-15)
            torch.testing.assert_close(moments.weight_columns, W.mean(0).sum(0), rtol=1e-5, atol=1e-15)
            assert (row.d_out, row.d_in) == tuple(W.shape[1:])
            assert row.params == row.rank * (row.d_out + row.d_in) == 4 * sum(W.shape[1:])


@pytest.mark.parametrize("side", ["right", "left"])
def test_neither_batches_nor_order_nor_padding_matter(tiny_llama, randomize, side):
    adapted = adapt(tiny_llama(), ["q_proj", "v_proj"], randomize).float()
    examples = text_examples()
    expected = [row.fisher for row in probe(adapted, padded(examples, 1), progress=False).modules]
    for size, extra, order in ((2, 0, 1), (3, 4, -1), (5, 2, 1)):
        report = probe(adapted, padded(examples[::order], size, side, extra), progress=False)
        assert [row.fisher for row in report.modules] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_batch_with_as_many_examples_as_tokens_is_told_apart_in_parts(tiny_llama, monkeypatch):
    """Such a batch as a whole could be time first, and is not run one example at a time for that."""
    model, calls = tiny_llama(), []
    monkeypatch.setattr(
        model, "forward", lambda *a, f=model.forward, **k: calls.append(len(k["input_ids"])) or f(*a, **k)
    )
    examples = text_examples(lengths=(8,) * 8)
    report = probe(model, padded(examples, 8), progress=False)
    assert calls == [4, 4]
    calls.clear()
    again = probe(model, padded(examples, 1), progress=False)
    assert calls == [1] * 8
    assert [r.fisher for r in report.modules] == pytest.approx([r.fisher for r in again.modules], rel=1e-5)


def test_large_batches_are_run_in_parts_on_the_cpu(tiny_llama, monkeypatch):
    model, calls = tiny_llama(), []
    monkeypatch.setattr(
        model, "forward", lambda *a, f=model.forward, **k: calls.append(len(k["input_ids"])) or f(*a, **k)
    )
    examples = text_examples(lengths=(50,) * 15)
    probe(model, padded(examples, 15), num_examples=9, progress=False)
    assert max(calls) * 50 <= CPU_TOKENS
    assert calls == [5, 5]


def test_a_bare_base_model_gets_a_temporary_lora(tiny_llama):
    """The report is that of a PeftModel whose LoRA was drawn from the same seed."""
    examples = text_examples()
    base = tiny_llama(torch.float64)
    report = probe(base, padded(examples, 2), seed=5, progress=False)
    assert report.temporary
    assert report.train_steps == 0
    assert report.target_modules == ("q_proj", "v_proj")
    assert {(row.rank, row.scaling) for row in report.modules} == {(16, 2.0)}
    torch.manual_seed(5)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(base, config).double().eval()
    names = [row.module_name for row in report.modules]
    assert [(row.role, row.layer) for row in report.modules] == [("query", 0), ("value", 0), ("query", 1), ("value", 1)]
    expected = one_backward_each(adapted, examples, names)
    assert [row.fisher for row in report.modules] == pytest.approx([float(expected[n].mean()) for n in names], rel=1e-5)
    other = probe(adapted.unload(), padded(examples, 2), seed=6, progress=False)
    assert other.modules[0].fisher != report.modules[0].fisher


def test_the_ratio_of_values_to_queries_by_hand(tiny_llama, randomize):
    """Mean over all entries of the one over that of the other; the standard error is that of the linearised ratio."""
    adapted = adapt(tiny_llama(torch.float64), ["q_proj", "v_proj"], randomize)
    examples = text_examples()
    report = probe(adapted, padded(examples, 5), progress=False)
    names = [row.module_name for row in report.modules]
    F = one_backward_each(adapted, examples, names)
    v, q = (
        torch.cat([F[n].flatten(1) for n in names if n.endswith(leaf)], dim=1).mean(1).numpy()
        for leaf in ("v_proj", "q_proj")
    )
    ratio = v.mean() / q.mean()
    covariance = np.cov(v, q) / len(v)
    gradient = np.array([1 / q.mean(), -v.mean() / q.mean() ** 2])
    assert report.vq_ratio.value == pytest.approx(ratio, rel=1e-6)
    assert report.vq_ratio.stderr == pytest.approx(math.sqrt(gradient @ covariance @ gradient), rel=1e-6)
    by_role = {group.role: group for group in report.roles}
    assert by_role["value"].fisher == pytest.approx(v.mean(), rel=1e-6)
    assert by_role["value"].stderr == pytest.approx(v.std(ddof=1) / math.sqrt(5), rel=1e-6)
    layer = torch.cat([F[n].flatten(1) for n in names if ".1." in n], dim=1).mean()
    assert report.layers[1].fisher == pytest.approx(float(layer), rel=1e-6)
    assert probe(adapted, padded(examples, 5), target_modules=["v_proj"], progress=False).vq_ratio is None


def test_examples_without_labels_are_left_out_and_counted(tiny_llama):
    examples = text_examples()
    without = {"input_ids": examples[0]["input_ids"], "labels": torch.full((7,), -100)}
    model = tiny_llama()
    report = probe(model, padded([*examples[:2], without, *examples[2:]], 3), progress=False)
    assert (report.num_examples, report.num_without_labels) == (5, 1)
    expected = probe(model, padded(examples, 1), progress=False)
    assert [r.fisher for r in report.modules] == pytest.approx([r.fisher for r in expected.modules], rel=1e-5)
    with pytest.raises(CalibrationError, match="None of the 1 examples looked at has a label"):
        probe(model, padded([without], 1), progress=False)


def test_a_module_used_twice_adds_its_gradients_before_they_are_squared(randomize):
    base = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**SMALL, embedding_size=16, num_hidden_groups=1, inner_group_num=1)
    )
    adapted = adapt(base, ["query", "value"], randomize)
    examples = text_examples(lengths=(6,) * 4)
    report = probe(adapted, padded(examples, 2), factors=["A", "weight"], progress=False)
    for row in report.modules:
        for kind, found in (("lora_B", row.fisher), ("lora_A", row.factor_a.value), ("weight", row.weight.value)):
            expected = one_backward_each(adapted, examples, [row.module_name], kind)[row.module_name]
            assert found == pytest.approx(float(expected.mean()), rel=1e-6)


def test_a_loss_function_and_gradient_checkpointing(tiny_llama, randomize):
    adapted = adapt(tiny_llama(torch.float64), ["q_proj", "v_proj"], randomize)
    examples = text_examples(lengths=(6,) * 4)
    expected = [row.fisher for row in probe(adapted, padded(examples, 2), progress=False).modules]

    def loss_fn(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        return 3 * losses.sum(1) / (labels != -100).sum(1)

    tripled = probe(adapted, padded(examples, 4), loss_fn=loss_fn, progress=False)
    assert [row.fisher for row in tripled.modules] == pytest.approx([9 * value for value in expected], rel=1e-5)
    adapted.train()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in adapted.get_base_model().model.layers:  # which it leaves to training mode otherwise
        layer.train()
        layer.eval = lambda layer=layer: layer
    again = probe(adapted, padded(examples, 2), factors=["weight"], progress=False)
    assert [row.fisher for row in again.modules] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_mixes_the_examples_is_run_one_at_a_time(tiny_llama, randomize, monkeypatch):
    """Activations (examples · tokens, d) do not say whose each token is."""
    examples = text_examples(lengths=(6,) * 3)
    adapted = adapt(tiny_llama(torch.float64), ["q_proj", "down_proj"], randomize)
    expected = [row.fisher for row in probe(adapted, padded(examples, 3), progress=False).modules]
    for layer in adapted.get_base_model().model.layers:
        mlp = layer.mlp
        monkeypatch.setattr(mlp, "forward", lambda x, f=mlp.forward: f(x.flatten(0, 1)).view_as(x))
    report = probe(adapted, padded(examples, 3), progress=False)
    assert [row.fisher for row in report.modules] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-10), ("gemma2", 1e-5)])
def test_the_loss_is_of_the_model_s_own_function_and_logits_that_hooks_keep_stay(kind, tolerance, tiny_gpt2, randomize):
    """GPT-2 in float64 throughout, and Gemma2 with a soft cap on its logits."""
    torch.manual_seed(1)
    dtype = torch.float64 if kind == "gpt2" else torch.float32
    settings = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5}
    base = (
        tiny_gpt2()
        if kind == "gpt2"
        else transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, **settings, attn_implementation="eager"))
    )

    def loss_function(logits, labels, vocab_size, **_):  # transformers' own computes in float32
        assert logits.dtype == dtype
        return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].flatten())

    base.loss_function = loss_function
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    adapted = randomize(get_peft_model(base, LoraConfig(r=4, target_modules=targets))).to(dtype).eval()
    examples = text_examples()
    names = list(layers_of(base))
    expected = one_backward_each(adapted, examples, names)
    kept = []
    handle = base.lm_head.register_forward_hook(lambda *hook: kept.append((hook[2], hook[2].detach().clone())))
    unlabelled = {"input_ids": examples[0]["input_ids"], "labels": torch.full((7,), -100)}
    report = probe(adapted, padded([unlabelled, *examples], 4), progress=False)
    handle.remove()
    assert report.num_without_labels == 1
    assert [row.fisher for row in report.modules] == pytest.approx(
        [float(expected[name].mean()) for name in names], rel=tolerance, abs=0
    )
    assert len(kept) == 2
    assert all(torch.equal(now, then) for now, then in kept)
    assert base.loss_function is loss_function


def test_bfloat16_is_near_the_same_weights_in_float32(tiny_llama):
    examples = text_examples()
    low = tiny_llama(torch.bfloat16)
    high = copy.deepcopy(low).float()
    reports = [
        probe(model, padded(examples, 5), target_modules=["v_proj", "o_proj"], progress=False) for model in (low, high)
    ]
    for a, b in zip(*(report.modules for report in reports), strict=True):
        assert a.fisher == pytest.approx(b.fisher, rel=0.1)


def snapshot(model):
    return {
        "tree": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype, p.grad) for name, p in model.named_parameters()],
        "values": [tensor.clone() for tensor in model.state_dict().values()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),
        "rng": [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()],
    }


def assert_same(before, after):
    for key in before:
        for a, b in zip(before[key], after[key], strict=True):
            assert (
                torch.equal(a, b)
                if isinstance(a, torch.Tensor)
                else np.array_equal(a, b)
                if isinstance(a, np.ndarray)
                else a == b
            ), key


def broken(batches):
    yield batches[0]
    raise RuntimeError("the disk is full")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_base_model_is_left_without_a_trace(tiny_llama, dtype, trained, fails):
    model = tiny_llama(dtype).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    batches = padded(text_examples(), 2)
    before = snapshot(model)
    train = {"train_loader": batches, "train_steps": 2} if trained else {}
    if fails:
        with pytest.raises(RuntimeError, match="the disk is full"):
            probe(model, broken(batches), factors=["A"], progress=False, **train)
    else:
        probe(model, batches, factors=["A"], progress=False, **train)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("fails", [False, True])
def test_an_adapter_in_training_is_left_as_it_was(tiny_llama, fails):
    """And its optimizer: what is trained after a probe is what would have been without it."""
    batches = padded(text_examples(), 2)
    ends = []
    for probed in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            loss = model(**batches[step % 2]).loss
            loss.backward()
            if probed and step == 2:
                before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
                if fails:
                    with pytest.raises(RuntimeError, match="the disk is full"):
                        probe(model, broken(batches), factors=["weight"], progress=False)
                else:
                    report = probe(model, batches, factors=["weight"], progress=False)
                    assert not report.temporary
                    assert {row.rank for row in report.modules} == {4}
                assert_same(before, snapshot(model))
                assert str(state) == str(optimizer.state_dict())
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.slow
def test_the_probe_after_some_training(tiny_llama):
    """Deterministic by seed; after steps at a rate of zero it is the probe at step 0."""
    model, batches = tiny_llama(), padded(text_examples(), 2)
    start = probe(model, batches, progress=False)
    still = probe(model, batches, train_loader=batches, train_steps=3, learning_rate=0.0, progress=False)
    assert [r.fisher for r in still.modules] == pytest.approx([r.fisher for r in start.modules], rel=1e-6)
    runs = [
        probe(model, batches, train_loader=batches, train_steps=7, learning_rate=1e-2, factors=["A"], progress=False)
        for _ in range(2)
    ]
    assert_close_reports(runs[0], runs[1])
    assert runs[0].train_steps == 7
    assert all(row.factor_a.value > 0 for row in runs[0].modules)
    assert runs[0].modules[0].fisher != pytest.approx(start.modules[0].fisher, rel=1e-3)
    with pytest.raises(CalibrationError, match="`train_loader` yielded no batch"):
        probe(model, batches, train_loader=[], progress=False)
    with pytest.raises(CalibrationError, match="cannot be repeated"):
        probe(model, batches, train_loader=iter(batches), progress=False)


def test_the_next_steps_run(tiny_llama):
    report = probe(tiny_llama(), padded(text_examples(), 5), progress=False)
    names = {"report": report}
    exec("\n".join(report.next_steps), names)
    assert isinstance(names["config"], FisherLoRAConfig)


@pytest.mark.slow
def test_under_inference_mode_the_result_is_the_same(tiny_llama, randomize):
    model = tiny_llama()
    adapted = adapt(tiny_llama(), ["q_proj", "v_proj"], randomize).float()
    expected = [
        [row.fisher for row in probe(m, padded(text_examples(), 2), factors=["weight"], progress=False).modules]
        for m in (model, adapted)
    ]
    with torch.inference_mode():
        batches = padded(text_examples(), 2)
        assert batches[0]["input_ids"].is_inference()
        found = [
            [row.fisher for row in probe(m, batches, factors=["weight"], progress=False).modules]
            for m in (model, adapted)
        ]
        probe(model, batches, train_loader=batches, train_steps=1, progress=False)
        made_inside = copy.deepcopy(model)
    assert found == expected
    with pytest.raises(CalibrationError, match=r"made under torch.inference_mode\(\): .* is an inference tensor"):
        probe(made_inside, padded(text_examples(), 2), progress=False)


def test_gradients_that_are_all_zero_are_an_error(tiny_llama, randomize):
    batches = padded(text_examples(), 2)

    def ignores_the_model(model, batch):
        return torch.zeros(len(batch["labels"]), requires_grad=True) * 1.0

    with pytest.raises(CalibrationError, match=r"all 5 examples has a gradient of exactly 0 .* 4 .*`loss_fn`"):
        probe(tiny_llama(), batches, loss_fn=ignores_the_model, progress=False)
    adapted = adapt(tiny_llama(), ["q_proj", "v_proj"], randomize).float()
    for layer in layers_of(adapted).values():
        layer.scaling["default"] = 0.0
    with pytest.raises(CalibrationError, match="scaling or lora_A is 0"):
        probe(adapted, batches, progress=False)
    for layer in layers_of(adapted).values():
        layer.scaling["default"] = 2.0
        nn.init.zeros_(layer.lora_B["default"].weight)
    report = probe(adapted, batches, factors=["A"], progress=False)  # A's gradient is 0 because B is
    assert all(row.factor_a.value == 0 and row.fisher > 0 for row in report.modules)


@pytest.mark.slow
def test_the_report_is_plain_data_and_can_be_drawn(tiny_llama):
    report = probe(tiny_llama(), padded(text_examples(), 5), target_modules="all-linear", progress=False)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {"module_name", "role", "layer", "rank", "params", "fisher", "stderr"} <= set(plain["modules"][0])
    assert plain["vq_ratio"]["value"] == report.vq_ratio.value
    assert [group["role"] for group in plain["roles"]] == ["query", "key", "value", "output", "gate", "up", "down"]
    assert [group["layer"] for group in plain["layers"]] == [0, 1]
    figure = report.plot()
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [group.role for group in report.roles]
    assert report.model_name in figure.get_suptitle()
    assert repr(report).startswith("FisherReport: LlamaForCausalLM: 14 modules, 5 examples, V/Q ratio ")
    assert len(report.to_frame()) == len(report.rows()) == 14
    assert report.details[0].count(",") == 6
    one = probe(tiny_llama(), padded(text_examples(), 1), num_examples=1, progress=False)
    assert one.modules[0].stderr is None
    assert one.vq_ratio.stderr is None
    json.dumps(one.to_dict(), allow_nan=False)


def test_speclora_and_named_targets(tiny_llama, randomize):
    model = get_peft_model(
        tiny_llama(torch.float64), SpecLoRAConfig(r=4, k=8, target_modules=["q_proj", "v_proj", "embed_tokens"])
    )
    randomize(model).double()
    examples = text_examples()
    report = probe(model, padded(examples, 5), progress=False)
    assert report.unprobed == ("model.embed_tokens",)
    names = [row.module_name for row in report.modules]
    expected = one_backward_each(model, examples, names)
    assert [r.fisher for r in report.modules] == pytest.approx([float(expected[n].mean()) for n in names], rel=1e-6)
    some = probe(model, padded(examples, 5), target_modules=r".*layers\.1\..*", progress=False)
    assert some.target_modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


@pytest.mark.slow
def test_what_cannot_be_probed_says_why(tiny_llama, tiny_gpt2):
    batches = padded(text_examples(), 5)

    def adapted(**settings):
        return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], **settings))

    merged, disabled = adapted(), adapted()
    merged.merge_adapter()
    disabled.base_model.disable_adapter_layers()
    native = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama())
    for model, arguments, error, message in (
        (merged, {}, UnsupportedModelError, "Call unmerge_adapter"),
        (disabled, {}, UnsupportedModelError, "are disabled"),
        (adapted(use_dora=True), {}, UnsupportedModelError, "a variant of LoRA"),
        (native, {}, UnsupportedModelError, "is not a PeftModel"),
        (adapted(), {"target_modules": ["k_proj"]}, UnsupportedModelError, "no linear module that matches"),
        (adapted(), {"train_loader": batches}, ValueError, "`train_loader` trains the temporary LoRA"),
        (adapted(), {"factors": ["C"]}, ValueError, "`factors` must be among B, A, weight"),
        (tiny_llama(), {"adapter_name": "a"}, ValueError, "`adapter_name` is for a PeftModel"),
        (tiny_llama(), {"train_steps": 0}, ValueError, "`train_steps` must be a positive integer"),
        (tiny_llama(), {"num_examples": 0}, ValueError, "`num_examples` must be a positive integer"),
        (tiny_llama(), {"seed": 2**64}, ValueError, r"`seed` must be an integer from 0 to 2\*\*63 - 1"),
        (tiny_llama(), {"target_modules": ["embed_tokens"]}, UnsupportedModelError, "is a layer of type Embedding"),
        (tiny_llama(), {"target_modules": ["nothing"]}, ValueError, "not found in the base model"),
        (tiny_gpt2(), {}, UnsupportedModelError, "fuses"),
    ):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            probe(model, batches, progress=False, **arguments)
        assert_same(before, snapshot(model))


RULES = ["fisher", "fisherlora", "spectral", "prior", "uniform"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_config_from_a_probe_gives_exactly_the_allocated_ranks(tiny_llama, tmp_path, rule, targets):
    base, batches = tiny_llama(), padded(text_examples(), 5)
    report = probe(base, batches, target_modules=targets, progress=False)
    config = FisherLoRAConfig.from_probe(report, budget=0.625, rule=rule, r=8, task_type="CAUSAL_LM")
    allocation = ranks_from_probe(report, budget=0.625, rule=rule, r=8)
    uniform = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=targets)).get_nb_trainable_parameters()[0]
    assert allocation.budget == math.floor(0.625 * uniform)
    model = get_peft_model(base, config)
    layers = layers_of(model.get_base_model())
    assert {name: layer.lora_A["default"].weight.shape[0] for name, layer in layers.items()} == allocation.ranks
    assert model.get_nb_trainable_parameters()[0] == allocation.cost <= allocation.budget
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    model.save_pretrained(str(tmp_path))
    loaded = layers_of(PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).get_base_model())
    for name, layer in loaded.items():
        assert torch.equal(layer.lora_A["default"].weight, layers[name].lora_A["default"].weight)
        assert layer.scaling["default"] == 2.0


def test_ranks_per_role_make_a_short_pattern(tiny_llama):
    report = probe(tiny_llama(), padded(text_examples(), 5), progress=False)
    config = FisherLoRAConfig.from_probe(report, params=500, rule="fisher", per="role", r=8)
    assert set(config.rank_pattern) <= {"q_proj", "v_proj"}
    assert config.target_modules == {"q_proj", "v_proj"}
    assert (config.r, config.lora_alpha, config.peft_type.value) == (8, 16, "FISHERLORA")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0.5, "params": 10}, ValueError, "exclude each other"),
        ({"budget": 2.0}, ValueError, r"`budget` must be a fraction in \(0, 1\]"),
        ({"budget": 0.01}, AllocationError, "`budget` must cover rank 1 in all 4 modules"),
        ({"rule": "energy"}, AllocationError, "spectra of a trained adapter"),
        ({"rule": "none"}, AllocationError, "`rule` must be one of"),
        ({"r": 0}, ValueError, "`r` must be a positive integer"),
        ({"r_q": 2}, ValueError, r"sets \['r_q'\] itself"),
    ],
)
def test_a_config_from_a_probe_refuses_what_makes_no_sense(tiny_llama, settings, error, message):
    report = probe(tiny_llama(), padded(text_examples(), 5), progress=False)
    with pytest.raises(error, match=message):
        FisherLoRAConfig.from_probe(report, **settings)


def as_measured(q, v, n=16):
    """A report of two modules whose per-example F are `q` and `v`, with a little noise."""
    rows, moments = [], {}
    for name, role, values in (("q_proj", "query", q), ("v_proj", "value", v)):
        per_example = torch.tensor(values, dtype=torch.float64)
        rows.append(FisherRow(name, role, None, 64, 64, 16, 2.0, 2048, float(per_example.mean()), None, None, None))
        moments[name] = Moments(per_example, None, None)
    return FisherReport("m", tuple(rows), ("q_proj", "v_proj"), len(q), 0, True, 0, 0, None, (), moments)


def test_the_interval_of_the_ratio_is_a_t_interval_of_its_logarithm():
    q, v = [1.0, 2.0, 1.5, 1.2], [3.0, 5.0, 4.0, 2.0]
    report = as_measured(q, v)
    ratio = np.mean(v) / np.mean(q)
    error = np.std(np.array(v) - ratio * np.array(q), ddof=1) / np.mean(q) / 2
    width = scipy.stats.t.ppf(0.95, 3) * error / ratio
    assert report.vq_interval == pytest.approx((ratio * np.exp(-width), ratio * np.exp(width)))
    assert as_measured([1.0], [2.0]).vq_interval is None
    assert as_measured([0.0, 0.0], [2.0, 1.0]).vq_interval is None


def test_the_paper_s_rule_is_the_default_where_queries_and_values_were_probed(recwarn):
    report = as_measured([1.0, 1.1, 0.9], [9.0, 10.0, 11.0])
    assert ranks_from_probe(report).rule == "fisherlora"
    assert FisherLoRAConfig.from_probe(report).rank_pattern == {"q_proj": 4}
    assert not recwarn.list
    values = dataclasses.replace(report, modules=report.modules[1:])
    assert ranks_from_probe(values).rule == "fisher"


@pytest.mark.parametrize(
    ("q", "v", "message"),
    [
        ([1.0, 2.0, 0.5], [1.1, 2.2, 0.1], "has the 90 % interval .* here, which is not above 1"),
        ([2.0, 2.0, 2.1], [1.0, 1.0, 1.1], "has the 90 % interval"),
        ([2.0], [4.0], "has no interval here"),
    ],
)
def test_the_paper_s_rule_warns_where_the_ratio_may_be_1(q, v, message):
    with pytest.warns(UserWarning, match=message):
        ranks_from_probe(as_measured(q, v))


@pytest.mark.parametrize("rule", ["fisher", "prior"])
def test_ranks_by_module_are_at_most_twice_r_unless_said_otherwise(rule):
    report = as_measured([1e-6] * 3, [9.0, 10.0, 11.0])
    assert ranks_from_probe(report, rule=rule, params=128 * 40, r=8).ranks == {"q_proj": 16, "v_proj": 16}
    assert ranks_from_probe(report, rule=rule, params=128 * 40, r=8, max_rank=10).ranks["v_proj"] == 10
