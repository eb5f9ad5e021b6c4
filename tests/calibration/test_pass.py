"""What ends a pass: loaders without an end or without examples, and models that cannot be differentiated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lorakit.calibration import run
from lorakit.calibration.batches import differentiable, examples_of
from lorakit.calibration.run import collect
from lorakit.errors import CalibrationError


class Constant:
    """A probe whose statistic is 1 for every example."""

    def begin(self, *, one_example):
        pass

    def collect(self, num_examples):
        return torch.ones(num_examples, 1)


def labelled(counts=True):
    ids = torch.tensor([[1, 2, 3, 4]] * 2)
    return {"input_ids": ids, "labels": ids if counts else torch.full_like(ids, -100)}


def test_an_endless_loader_without_labels_ends(tiny_llama, monkeypatch):
    monkeypatch.setattr(run, "MAX_WITHOUT_LABELS", 20)
    with pytest.raises(CalibrationError, match="None of the 20 examples looked at has a label"):
        collect(tiny_llama(), itertools.repeat(labelled(False)), [Constant()], num_examples=4, progress=False)


def test_an_endless_loader_that_runs_out_of_labels_counts_as_exhausted(tiny_llama, monkeypatch):
    monkeypatch.setattr(run, "MAX_WITHOUT_LABELS", 20)
    loader = itertools.chain([labelled(False)] * 9, [labelled()], itertools.repeat(labelled(False)))
    found = collect(tiny_llama(), loader, [Constant()], num_examples=4, progress=False)
    assert (found.num_examples, found.num_without_labels) == (2, 18 + 20)


def test_a_batch_without_examples_is_an_error(tiny_llama):
    empty = {key: value[:0] for key, value in labelled().items()}
    with pytest.raises(CalibrationError, match=r"a batch without examples: `labels` of shape \(0, 4\)"):
        collect(tiny_llama(), itertools.repeat(empty), [Constant()], num_examples=4, progress=False)


def test_a_pass_leaves_inference_mode_and_keeps_gradients_on_or_off(tiny_llama):
    seen = []

    def loader():
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        yield labelled()

    model = tiny_llama()
    with torch.inference_mode():
        collect(model, loader(), [Constant()], num_examples=2, progress=False)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        collect(model, loader(), [Constant()], num_examples=2, progress=False)
        assert not torch.is_grad_enabled()
    collect(model, loader(), [Constant()], num_examples=2, progress=False)
    assert seen == [(False, False), (False, False), (False, True)]
    assert torch.is_grad_enabled()


def test_a_buffer_made_under_inference_mode_is_refused_by_name():
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        model.register_buffer("mask", torch.ones(2))
    with pytest.raises(CalibrationError, match="'mask' is an inference tensor"):
        collect(model, [torch.ones(1, 2)], [], num_examples=1, loss_fn=lambda m, b: m(b).sum(1), progress=False)


def test_inference_tensors_are_cloned_wherever_they_are_and_others_are_not():
    normal = torch.ones(2)
    with torch.inference_mode():
        inside = torch.ones(2)
    batch = {"a": [inside, (normal, inside)], "b": "text"}
    copied = differentiable(batch)
    assert copied["b"] == "text"
    assert not copied["a"][0].is_inference()
    assert not copied["a"][1][1].is_inference()
    assert copied["a"][1][0] is normal
    assert batch["a"][0] is inside


def test_examples_of_nested_batches():
    batch = {"ids": torch.arange(6).view(2, 3), "names": ["x", "y"], "pair": (torch.tensor([5, 6]), torch.ones(3))}
    first, second = examples_of(batch | {"labels": torch.tensor([0, 1])})
    assert (first["ids"].tolist(), second["names"]) == ([[0, 1, 2]], ["y"])
    assert second["pair"][0].tolist() == [6]
    assert second["pair"][1].tolist() == [1, 1, 1]
