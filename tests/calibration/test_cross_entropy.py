"""The lean cross-entropy against torch's, and that models keep their losses."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from closeness import TOLERANCE, assert_close_outputs
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.calibration._cross_entropy import _CrossEntropy, _Lean, low_memory_cross_entropy

TOKENS, CLASSES = 11, 37
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def logits_and_labels(dtype, scale=1.0):
    logits = (scale * torch.randn(TOKENS, CLASSES, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (TOKENS,))
    labels[::4] = -100
    return logits, labels


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_it_is_torch_s_to_the_bit_and_its_gradient_to_rounding(dtype, tolerance, scale):
    logits, labels = logits_and_labels(dtype, scale)
    expected = F.cross_entropy(logits, labels)
    found = _CrossEntropy.apply(logits, labels, -100)
    assert torch.equal(found, expected)
    (wanted,) = torch.autograd.grad(3 * expected, logits)
    (gradient,) = torch.autograd.grad(3 * found, logits)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)
    assert not gradient[::4].any()


def test_its_gradient_is_the_formula():
    logits, labels = logits_and_labels(torch.float64)
    (gradient,) = torch.autograd.grad(_CrossEntropy.apply(logits, labels, -100), logits)
    counted = labels != -100
    expected = torch.softmax(logits.detach(), 1) - F.one_hot(labels.clamp(min=0), CLASSES)
    torch.testing.assert_close(gradient, expected * counted.unsqueeze(1) / counted.sum(), rtol=0, atol=1e-15)


def test_masked_classes_and_no_labels_at_all():
    logits, labels = logits_and_labels(torch.float32)
    masked = logits.detach().clone()
    masked[:, 0] = -math.inf
    masked.requires_grad_()
    labels[labels == 0] = 1
    (gradient,) = torch.autograd.grad(_CrossEntropy.apply(masked, labels, -100), masked)
    (expected,) = torch.autograd.grad(F.cross_entropy(masked, labels), masked)
    torch.testing.assert_close(gradient, expected)
    assert torch.isfinite(gradient).all()
    loss = _CrossEntropy.apply(logits, torch.full((TOKENS,), -100), -100)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))  # as torch's


def test_a_second_backward_is_an_error_and_not_another_gradient():
    logits, labels = logits_and_labels(torch.float32)
    loss = _CrossEntropy.apply(logits, labels, -100)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize(
    ("options", "lean"),
    [
        ({}, True),
        ({"ignore_index": 3}, True),
        ({"reduction": "sum"}, False),
        ({"reduction": "none"}, False),
        ({"label_smoothing": 0.1}, False),
        ({"weight": torch.rand(CLASSES)}, False),
        ({"size_average": False}, False),
        ({"logits": torch.bfloat16}, False),
        ({"labels": "probabilities"}, False),
        ({"labels": "images"}, False),
    ],
)
def test_all_but_a_plain_mean_is_left_to_torch(options, lean):
    options = dict(options)
    logits, labels = logits_and_labels(options.pop("logits", torch.float32))
    kind = options.pop("labels", None)
    if kind == "probabilities":
        labels = torch.softmax(torch.randn(TOKENS, CLASSES), 1)
    elif kind == "images":
        logits, labels = (tensor.unsqueeze(0) for tensor in (logits.mT, labels))
    elif "ignore_index" in options:
        labels = labels.clamp(min=0)
    with _Lean():
        loss = F.cross_entropy(logits, labels, **options)
    assert (type(loss.grad_fn).__name__ == "_CrossEntropyBackward") == lean
    expected = F.cross_entropy(logits, labels, **options)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected)))


def test_other_subclasses_of_tensors_are_left_alone():
    class Other(torch.Tensor):
        pass

    logits, labels = logits_and_labels(torch.float32)
    with _Lean():
        loss = F.cross_entropy(logits.as_subclass(Other), labels)
    assert type(loss.grad_fn).__name__ != "_CrossEntropyBackward"


class Large(TorchDispatchMode):
    """Keeps every piece of memory that holds at least `size` entries, so that none is used twice."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                self.found[tensor.untyped_storage().data_ptr()] = tensor
        return out


@pytest.mark.parametrize(
    ("loss", "tensors"), [(lambda *args: _CrossEntropy.apply(*args, -100), 1), (F.cross_entropy, 3)]
)
def test_it_makes_one_tensor_as_large_as_the_logits(loss, tensors):
    logits, labels = logits_and_labels(torch.float32)
    with Large(logits.numel()) as large:
        torch.autograd.grad(loss(logits, labels), logits)
    assert len(large.found) == tensors


def model_of(kind, dtype):
    torch.manual_seed(1)
    model = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=2)),
        "soft-capped": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **TINY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager"
            )
        ),
        "masked": lambda: transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(**TINY, pad_token_id=0, attn_implementation="eager")
        ),
        "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0
            )
        ),
        "sequences": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=3)),
    }[kind]()
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "soft-capped", "masked", "encoder-decoder", "sequences"])
def test_models_have_the_loss_and_the_gradients_that_they_had(kind, dtype):
    model = model_of(kind, dtype)
    ids = torch.randint(1, 64, (3, 6))
    labels = torch.tensor([0, 2, 1]) if kind == "sequences" else ids.clone().index_fill_(1, torch.tensor([0, 1]), -100)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run():
        loss = model(input_ids=ids, labels=labels).loss
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True)

    before = dict(vars(model))
    loss, gradients = run()
    with low_memory_cross_entropy(model):
        again, found = run()
    assert vars(model).keys() == before.keys()
    assert_close_outputs(again, loss, TOLERANCE[torch.float32])  # in which most of these models compute it
    # Models with a loss function compute it in float32, whatever they are in; bfloat16 ones then round its gradient.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    for a, b in zip(gradients, found, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))


def is_lean(model):
    ids = torch.randint(1, 64, (2, 6))
    return type(model(input_ids=ids, labels=ids).loss.grad_fn).__name__ == "_CrossEntropyBackward"


def test_a_model_s_own_loss_function_is_called_and_given_back(tiny_llama):
    model, calls = tiny_llama(), []
    assert not is_lean(model)
    with low_memory_cross_entropy(model):
        assert is_lean(model)
    assert not is_lean(model)
    given = model.loss_function
    own = model.loss_function = lambda *a, **k: calls.append(k["vocab_size"]) or given(*a, **k)
    with pytest.raises(AssertionError, match="lean"), low_memory_cross_entropy(model):
        assert not is_lean(model), "lean"
    assert model.loss_function is own
    assert calls == [64]
    assert not is_lean(model)


def test_models_without_a_loss_function_are_not_touched(tiny_llama, caplog):
    for model in (torch.nn.Linear(2, 2), tiny_llama().model):
        before = dict(vars(model))
        with low_memory_cross_entropy(model):
            assert vars(model) == before
    assert not caplog.records
