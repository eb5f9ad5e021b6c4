"""Sensitivities against autograd's derivative of each example's own loss, however the examples come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from closeness import assert_close_outputs
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters.in_model import live_modules
from lorakit.calibration.losses import LossScheme
from lorakit.surgery import sensitivity

TOLERANCE = 1e-5


def by_autograd(model, examples, adapter_name="default"):
    """Each example's dℓ/dσ: a dense ΔW as a parameter, one backward an example, and u_kᵀ G v_k."""
    training = model.training
    model.eval()
    rows = {}
    for module in live_modules(model, adapter_name):
        if module.role not in ("output", "down"):
            continue
        U, _, Vh = module.factors().svd()
        delta = torch.zeros(U.shape[0], Vh.shape[1], dtype=U.dtype, requires_grad=True)
        hook = module.layer.register_forward_hook(lambda _, args, out, delta=delta: out + F.linear(args[0], delta))
        found = []
        for ids, labels in examples:
            if (labels[1:] != -100).any():
                logits = model(input_ids=ids[None]).logits[0, :-1]
                loss = F.cross_entropy(logits.float(), labels[1:], ignore_index=-100)
                (gradient,) = torch.autograd.grad(loss, delta)
                found.append(torch.einsum("ok,oi,ki->k", U, gradient, Vh))
        hook.remove()
        rows[module.name] = torch.stack(found)
    model.train(training)
    return rows


def assert_same(report, expected, tolerance=TOLERANCE):
    assert {row.module_name for row in report.modules} == expected.keys()
    for row in report.modules:
        wanted = expected[row.module_name]
        assert row.per_example.shape == wanted.shape
        assert (row.per_example - wanted).abs().max() <= tolerance * wanted.abs().max(), row.module_name


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("side", ["right", "left"])
def test_it_equals_autograd_on_each_example_alone(adapted, examples, batches, batch_size, side):
    model = adapted()
    expected = by_autograd(model, examples)
    report = sensitivity(model, batches(batch_size, side=side), progress=False)
    assert_same(report, expected)
    assert (report.num_examples, report.num_without_labels) == (7, 1)
    for row in report.modules:
        assert row.sensitivity == pytest.approx(expected[row.module_name].abs().mean(0).tolist(), rel=1e-4)
    assert len(report.modules) == 4


def test_order_and_extra_padding_do_not_matter(adapted, batches):
    model = adapted()
    first = sensitivity(model, batches(3), progress=False)
    other = sensitivity(model, batches(4, side="left", order=[7, 2, 5, 0, 3, 6, 1, 4], pad_to=15), progress=False)
    for a, b in zip(first.modules, other.modules, strict=True):
        wanted = torch.tensor(a.sensitivity)
        assert (torch.tensor(b.sensitivity) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("aggregate", ["mean_abs", "mean", "abs_mean"])
def test_aggregates(adapted, batches, aggregate):
    report = sensitivity(adapted(), batches(), aggregate=aggregate, progress=False)
    for row in report.modules:
        g = row.per_example.double()
        wanted = {"mean_abs": g.abs().mean(0), "mean": g.mean(0), "abs_mean": g.mean(0).abs()}[aggregate]
        assert row.sensitivity == pytest.approx(wanted.tolist(), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        FisherLoRAConfig(r=6, r_q=2, target_modules="all-linear", use_rslora=True),
        SpecLoRAConfig(r=4, k=8, target_modules="all-linear"),
        LoraConfig(r=40, target_modules=["o_proj", "down_proj"]),
        LoraConfig(r=4, target_modules=["o_proj", "down_proj"], use_rslora=True, lora_dropout=0.5),
    ],
    ids=["fisherlora", "speclora", "rank above the width", "rslora and dropout"],
)
def test_other_adapters(adapted, examples, batches, config):
    model = adapted(config)
    expected = by_autograd(model, examples)
    assert_same(sensitivity(model, batches(3), progress=False), expected, 3e-5)


@pytest.mark.slow
def test_float64(adapted, examples, batches):
    """The decomposition is in float64; transformers computes the loss itself in float32."""
    model = adapted(dtype=torch.float64)
    report = sensitivity(model, batches(3), progress=False)
    assert_same(report, by_autograd(model, examples), 1e-6)
    assert report.modules[0].per_example.dtype == torch.float64


@pytest.mark.slow
def test_bfloat16_is_near_the_same_weights_in_float32(adapted, examples, batches):
    model = adapted(dtype=torch.bfloat16)
    wide = adapted()
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    expected = by_autograd(wide, examples)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = sensitivity(model, batches(3), progress=False)
    for row in report.modules:
        assert torch.isfinite(row.per_example).all()
        wanted = expected[row.module_name]
        assert (row.per_example - wanted).norm() <= 0.1 * wanted.norm()
        assert row.singular_values == pytest.approx(
            next(m for m in live_modules(wide, "default") if m.name == row.module_name)
            .factors()
            .singular_values()
            .tolist(),
            rel=1e-5,
            abs=1e-6,
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(adapted, examples, batches, reentrant):
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    report = sensitivity(model, batches(3), progress=False)
    assert model.training
    assert model.is_gradient_checkpointing
    assert_same(report, by_autograd(model, examples))


@pytest.mark.slow
def test_a_checkpointed_forward_in_eval_mode(adapted, examples, batches):
    """Recomputation runs the stand-ins twice; the gradient is that of once."""
    model = adapted()
    expected = by_autograd(model, examples)
    for layer in model.get_base_model().model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
    assert_same(sensitivity(model, batches(3), progress=False), expected)


def test_a_module_that_only_ran_without_gradients_is_an_error(adapted, batches):
    model = adapted()
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = torch.no_grad()(layer.mlp.forward)
    with pytest.raises(ValueError, match="ran without gradients"):
        sensitivity(model, batches(), progress=False)


@pytest.mark.slow
def test_a_model_that_flattens_examples_is_run_one_at_a_time(adapted, examples, batches):
    """Tokens of all examples in one row cannot be told apart for certain (mixtures of experts do this)."""
    model = adapted()
    expected = by_autograd(model, examples)
    for layer in model.get_base_model().model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: inner(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    assert_same(sensitivity(model, batches(4), progress=False), expected)


@pytest.mark.slow
def test_time_first_activations_are_told_from_batch_first_ones(adapted, examples, batches):
    model = adapted()
    expected = by_autograd(model, examples)
    for layer in model.get_base_model().model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: inner(x.transpose(0, 1)).transpose(0, 1)
    for batch_size in (1, 3, 8):
        assert_same(sensitivity(model, batches(batch_size, pad_to=batch_size), progress=False), expected)


@pytest.mark.slow
def test_tied_weights_and_shared_modules(adapted, examples, batches, tiny_llama):
    model = adapted(base=tiny_llama(tie_word_embeddings=True))
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight
    assert_same(sensitivity(model, batches(3), progress=False), by_autograd(model, examples))
    shared = adapted()
    layers = shared.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp  # used twice: its derivative is the sum over both uses
    expected = by_autograd(shared, examples)
    assert_same(sensitivity(shared, batches(3), progress=False), expected)


@pytest.mark.slow
def test_the_adapter_named_is_the_one_measured(adapted, examples, batches, randomize):
    model = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["o_proj", "down_proj"], modules_to_save=["lm_head"]))
    model.set_adapter("b")
    randomize(model, std=0.2, seed=9)
    expected_b = by_autograd(model, examples, "b")
    model.set_adapter("default")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    report = sensitivity(model, batches(3), adapter_name="b", progress=False)
    assert_same(report, expected_b)
    assert report.adapter_name == "b"
    assert model.active_adapters == ["default"]
    assert model.active_adapter == "default"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    expected = by_autograd(model, examples)
    assert_same(sensitivity(model, batches(3), progress=False), expected)


def test_a_loss_function_for_any_kind_of_batch(adapted, examples, batches):
    model = adapted()
    expected = by_autograd(model, examples)
    kept = [pair for n, pair in enumerate(examples) if n != 3]

    def loss_fn(model, batch):
        losses = []
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([labels for _, labels in batch], batch_first=True, padding_value=-100)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in batch], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row in range(len(batch)):
            losses.append(F.cross_entropy(logits[row, :-1], labels[row, 1:], ignore_index=-100))
        return torch.stack(losses)

    assert_same(sensitivity(model, [kept[:3], kept[3:]], loss_fn=loss_fn, progress=False), expected)


@pytest.mark.parametrize(("given", "used"), [(1, 1), (3, 3), (4, 4), (7, 7), (128, 7)])
def test_as_many_examples_as_asked_for_and_no_batch_more(adapted, batches, given, used):
    model = adapted()
    fetched = []

    def loader():
        for batch in batches(2):
            fetched.append(batch)
            yield batch

    full = sensitivity(model, batches(8), progress=False)
    report = sensitivity(model, loader(), num_examples=given, progress=False)
    assert report.num_examples == used
    assert len(fetched) == {1: 1, 3: 2, 4: 3, 7: 4, 128: 4}[given]
    for a, b in zip(full.modules, report.modules, strict=True):
        assert torch.allclose(a.per_example[:used], b.per_example, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "bert", "vit", "regression", "multilabel", "gpt2", "opt", "tokens"])
def test_other_models_losses_are_found_out(kind, randomize):
    """Shifted, plain, classification, regression: one example at a time is the reference."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    torch.manual_seed(0)
    n, generator = 5, torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (n, 6), generator=generator)
    labels = ids.clone()
    labels[0, 2:] = labels[2, 4:] = -100
    batch = {"input_ids": ids, "labels": labels}
    if kind == "t5":
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0
            )
        )
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=32)
        )
    elif kind == "opt":
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=50,
            )
        )
    elif kind == "tokens":
        model = transformers.BertForTokenClassification(transformers.BertConfig(**small, num_labels=4))
        batch["labels"] = torch.where(labels == -100, -100, labels % 4)
    elif kind == "vit":
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                **{k: v for k, v in small.items() if k != "vocab_size"}, image_size=8, patch_size=4, num_labels=3
            )
        )
        batch = {"pixel_values": torch.randn(n, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 2, 1, 1, 0])}
    else:
        count = {"bert": 3, "regression": 1, "multilabel": 4}[kind]
        problem = {"bert": None, "regression": "regression", "multilabel": "multi_label_classification"}[kind]
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**small, num_labels=count, problem_type=problem)
        )
        wanted = {
            "bert": torch.tensor([0, 2, 1, 1, 0]),
            "regression": torch.randn(n, generator=generator),
            "multilabel": torch.randint(0, 2, (n, 4), generator=generator).float(),
        }
        batch["labels"] = wanted[kind]
    model = randomize(get_peft_model(model, LoraConfig(r=3, target_modules="all-linear")), std=0.2)
    whole = sensitivity(model, [batch], progress=False)
    single = sensitivity(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(n)], progress=False)
    assert whole.num_examples == single.num_examples == n
    for a, b in zip(whole.modules, single.modules, strict=True):
        assert (a.per_example - b.per_example).abs().max() <= 2e-5 * b.per_example.abs().max(), a.module_name


@pytest.mark.parametrize("target", [["v_proj"], r".*layers\.1\..*proj", "all-linear", ["model.layers.0.mlp.up_proj"]])
def test_target_modules_are_matched_as_peft_matches_them(adapted, batches, target):
    report = sensitivity(adapted(), batches(), target_modules=target, num_examples=1, progress=False)
    names = [row.module_name for row in report.modules]
    assert len(names) == (
        1
        if target == ["model.layers.0.mlp.up_proj"]
        else {"all-linear": 14}.get(str(target), 2 if target == ["v_proj"] else 7)
    )


def test_modules_without_an_update_are_listed(adapted, batches):
    model = adapted()
    first = live_modules(model, "default")[0]
    zero = next(m for m in live_modules(model, "default") if m.role == "down")
    with torch.no_grad():
        zero.up.weight.zero_()
    report = sensitivity(model, batches(), progress=False)
    assert report.zero_modules == [zero.name]
    assert zero.name not in {row.module_name for row in report.modules}
    assert first.role == "query"


def test_the_report_is_plain_data(adapted, batches):
    import json

    report = sensitivity(adapted(), batches(), progress=False)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["num_examples"] == 7
    row = plain["modules"][0]
    assert row.keys() == {"module_name", "role", "rank", "scaling", "singular_values", "sensitivity"}
    assert row["module_name"] == "model.layers.0.self_attn.o_proj"
    assert len(row["singular_values"]) == len(row["sensitivity"]) == 4
    assert row["singular_values"] == sorted(row["singular_values"], reverse=True)


def test_the_report_in_a_table_and_a_figure(adapted, batches):
    report = sensitivity(adapted(), batches(), aggregate="mean", target_modules="all-linear", progress=False)
    assert report.headline.startswith("LlamaForCausalLM, adapter 'default': mean sensitivity of 14 modules, 7 examples")
    assert len(report.to_frame()) == 14 * 4
    figure = report.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["query", "key", "value", "output", "gate", "up", "down"]
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high  # signed values are shown around 0
    row = report.modules[0]
    scale = sum(map(abs, row.sensitivity)) / 4
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[0], np.array(row.sensitivity) / scale, rtol=1e-12)


def test_an_empty_report_can_be_drawn(tiny_llama, batches):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["o_proj"]))
    with pytest.warns(UserWarning, match="are zero"):
        report = sensitivity(model, batches(), progress=False)
    assert report.rows() == []
    assert report.details[0] == "2 modules have no update and were left alone"
    assert "no module has singular components" in report.plot().texts[-1].get_text()


@pytest.mark.slow
def test_cpu_offloaded_bases(adapted, examples, batches):
    from accelerate import cpu_offload

    model = adapted()
    expected = by_autograd(model, examples)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.is_meta
    assert_same(sensitivity(model, batches(3), progress=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_half_precision_losses_are_not_mistaken(kind, dtype, randomize, tiny_llama):
    """A loss computed in half precision is known to three digits, in which another kind of loss may agree by chance."""
    torch.manual_seed(0)
    if kind == "bert":
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = transformers.BertForMaskedLM(transformers.BertConfig(**small, vocab_size=64))
    elif kind == "t5":
        t5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
        base = transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, vocab_size=64))
    else:
        base = tiny_llama()
    model = get_peft_model(base.to(dtype), LoraConfig(r=2, target_modules="all-linear")).eval()
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        ids = torch.randint(1, 64, (8, 12), generator=generator)
        labels = torch.where(torch.rand(8, 12, generator=generator) < 0.7, -100, ids)
        labels[:, 1] = ids[:, 1]
        scheme = LossScheme(model)
        with torch.no_grad():
            losses = scheme({"input_ids": ids, "labels": labels})
        assert list(scheme.known.values()) == ["shifted" if kind == "llama" else "tokens"]
        assert losses.used == [True] * 8


def test_half_precision_does_not_hide_an_auxiliary_loss():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.MixtralForCausalLM(config).bfloat16(), LoraConfig(r=2, target_modules=["o_proj"])
    )
    ids = torch.randint(1, 64, (2, 9))
    with pytest.raises(ValueError, match="is not the mean of its examples' losses"):
        LossScheme(model)({"input_ids": ids, "labels": ids})


def test_a_causal_model_of_any_name_whose_first_example_has_only_a_first_label(randomize):
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=32)
    )
    model = randomize(get_peft_model(base, LoraConfig(r=3, target_modules=["c_proj"], fan_in_fan_out=True)), std=0.2)
    ids = torch.randint(1, 50, (1, 6))
    only_first = torch.full_like(ids, -100)
    only_first[0, 0] = ids[0, 0]
    report = sensitivity(
        model, [{"input_ids": ids, "labels": only_first}, {"input_ids": ids, "labels": ids}], progress=False
    )
    assert (report.num_examples, report.num_without_labels) == (1, 1)


def test_a_hole_in_the_attention_mask_is_not_padding(adapted):
    model = adapted()
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    report = sensitivity(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}], progress=False)
    alone = sensitivity(model, [{"input_ids": ids[:1], "attention_mask": mask[:1], "labels": ids[:1]}], progress=False)
    module = live_modules(model, "default")[3]
    U, _, Vh = module.factors().svd()
    delta = torch.zeros(U.shape[0], Vh.shape[1], requires_grad=True)
    module.layer.register_forward_hook(lambda _, args, out: out + F.linear(args[0], delta))
    model.eval()
    (gradient,) = torch.autograd.grad(model(input_ids=ids[:1], attention_mask=mask[:1], labels=ids[:1]).loss, delta)
    expected = torch.einsum("ok,oi,ki->k", U, gradient, Vh)
    for found in (report, alone):
        row = next(row for row in found.modules if row.module_name == module.name)
        assert torch.allclose(row.per_example[0], expected, atol=1e-5 * float(expected.abs().max()))


def test_one_odd_batch_does_not_slow_the_rest(adapted, batches):
    model = adapted()
    forwards = []
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda *_: forwards.append(1))
    square = batches(8, pad_to=8)[0]
    square = {key: value[:8, :8] for key, value in square.items()}
    sensitivity(model, [square, *batches(4)], progress=False)
    assert len(forwards) == 1 + 7 + 2  # the square batch once whole, then its seven labelled examples; two more batches


def test_batches_keep_their_kind_when_they_are_split(adapted, batches):
    from transformers import BatchEncoding

    model = adapted()
    seen = []

    def loss_fn(model, batch):
        seen.append(type(batch))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return torch.stack(
            [F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, batch.input_ids, strict=True)]
        )

    square = {key: value[:6, :6] for key, value in batches(8)[0].items()}
    report = sensitivity(model, [BatchEncoding(square)], loss_fn=loss_fn, progress=False)
    assert report.num_examples == 6
    assert set(seen) == {BatchEncoding}
    assert len(seen) == 7


def test_labels_that_are_not_a_tensor(adapted):
    with pytest.raises(ValueError, match="`labels` must be a tensor; got list"):
        sensitivity(
            adapted(), [{"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": [[1, 2, 3]]}], progress=False
        )


def test_a_model_without_input_embeddings(randomize):
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=16,
    )
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    model = randomize(get_peft_model(model, LoraConfig(r=2, target_modules=["out_proj"])), std=0.2)
    batch = {"input_values": torch.randn(3, 200), "labels": torch.tensor([0, 1, 2])}
    assert sensitivity(model, [batch], progress=False).num_examples == 3


def test_gradients_that_are_not_finite(adapted, batches):
    model = adapted()
    model.get_base_model().model.norm.register_full_backward_hook(lambda _, grads, outs: (grads[0] * float("inf"),))
    with pytest.raises(ValueError, match="losses are finite, but their gradients are not"):
        sensitivity(model, batches(), progress=False)


def test_a_split_batch_stops_at_the_number_of_examples(adapted, batches):
    model = adapted()
    runs = []
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda *_: runs.append(1))
    square = {key: value[:8, :8] for key, value in batches(8, pad_to=8)[0].items()}
    report = sensitivity(model, [square], num_examples=2, progress=False)
    assert report.num_examples == 2
    assert len(runs) == 1 + 2


def test_a_masked_model_named_like_a_causal_one_keeps_its_first_labels():
    torch.manual_seed(0)
    config = transformers.XLMConfig(emb_dim=32, n_layers=1, n_heads=4, vocab_size=50, n_langs=1)
    model = get_peft_model(transformers.XLMWithLMHeadModel(config), LoraConfig(r=2, target_modules=["q_lin"])).eval()
    ids = torch.randint(3, 50, (3, 6))
    scheme = LossScheme(model)
    assert scheme.shifts  # misled by the name
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    loss = scheme(batch).loss
    assert list(scheme.known.values()) == ["tokens"]
    assert not scheme.shifts
    assert_close_outputs(loss, model(**batch).loss)  # of all labels, the first ones too
