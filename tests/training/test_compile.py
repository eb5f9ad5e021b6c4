"""torch.compile: no graph breaks, as many graphs as PEFT's LoRA needs, and the results of eager mode."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_outputs
from peft import get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def lora_s():
    """What `statistics` found for LoRA, so that it is compiled once for each kind of test."""
    return {}


@pytest.fixture
def prepare(tiny_llama, randomize):
    """Makes a one-layer Llama with one or two adapters of random values."""

    def make(make_config, adapters=1):
        model = get_peft_model(tiny_llama(num_hidden_layers=1), make_config())
        if adapters == 2:
            model.add_adapter("second", make_config())
            model.base_model.set_adapter(["default", "second"])
        return randomize(model)

    return make


def run(model: nn.Module, ids: torch.Tensor):
    """Logits, and the gradients of all that is trained."""
    model.zero_grad()
    done = model(input_ids=ids, labels=ids)
    if done.loss.requires_grad:
        done.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return done.logits.detach(), {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}


def statistics(*calls):
    """The numbers of graph breaks and of graphs, after each of the calls; and what the calls returned."""
    torch._dynamo.reset()
    counters.clear()
    found, results = [], []
    for call in calls:
        results.append(call())
        found.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    return found, results


def check_equal(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("adapters", [1, 2])
def test_it_compiles_as_lora_does(adapters, make_config, make_lora, lora_s, prepare, token_ids):
    def compiled_runs(make_config):
        model = prepare(make_config, adapters)
        compiled = torch.compile(model, backend="aot_eager")
        return model, *statistics(lambda: run(compiled, token_ids), lambda: run(compiled, token_ids))

    if adapters not in lora_s:
        lora_s[adapters] = compiled_runs(make_lora)[1]
    model, found, results = compiled_runs(make_config)
    assert found == lora_s[adapters] == [(0, 1), (0, 1)]  # no break, and the second call compiles nothing
    eager = run(model, token_ids)
    assert len(eager[1]) == sum(p.requires_grad for p in model.parameters()) > 0
    for result in results:
        check_equal(result, eager)


def test_other_lengths_compile_as_lora_s_do(make_config, make_lora, prepare):
    def compiled_runs(make_config):
        block = prepare(make_config).base_model.model.model.layers[0].mlp
        compiled = torch.compile(block, backend="aot_eager")
        inputs = [torch.randn(2, length, 32) for length in (5, 8, 11)]
        found, results = statistics(*(lambda x=x: compiled(x) for x in inputs))
        for x, result in zip(inputs, results, strict=True):
            torch.testing.assert_close(result, block(x), rtol=0, atol=1e-5)
        return found

    # A second graph, for any length, serves the third as well.
    assert compiled_runs(make_config) == compiled_runs(make_lora) == [(0, 1), (0, 2), (0, 2)]


def test_disabled_adapters_compile_as_lora_s_do(make_config, make_lora, lora_s, prepare, tiny_llama, token_ids):
    def compiled_runs(make_config):
        model = prepare(make_config)
        compiled = torch.compile(model, backend="aot_eager")

        def disabled():
            with model.disable_adapter():
                return run(compiled, token_ids)

        with torch.no_grad():
            return statistics(lambda: run(compiled, token_ids), disabled, lambda: run(compiled, token_ids))

    if "disabled" not in lora_s:
        lora_s["disabled"] = compiled_runs(make_lora)[0]
    found, ((enabled, _), (disabled, _), (again, _)) = compiled_runs(make_config)
    assert found == lora_s["disabled"]
    with torch.no_grad():
        base = tiny_llama(num_hidden_layers=1)(input_ids=token_ids).logits
    torch.testing.assert_close(disabled, base, rtol=0, atol=1e-5)
    assert_close_outputs(again, enabled)
    assert (enabled - base).abs().max() > 1e-3


def test_a_training_step_under_autocast_compiles_whole(make_any_config, prepare, token_ids):
    model = prepare(make_any_config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = run(model, token_ids)
        # SpecLoRA's gradients are added up in another order than eagerly, of which bfloat16 keeps eight bits
        tolerance = 1e-2 if "SPECLORA" in str(model.peft_config["default"].peft_type) else 1e-4
        check_equal(run(torch.compile(model, backend="aot_eager", fullgraph=True), token_ids), eager, tolerance)


def test_inductor_computes_the_same(make_config, prepare):
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor needs a C++ compiler: {error}")
    block = prepare(make_config).base_model.model.model.layers[0].mlp
    compiled = torch.compile(block, backend="inductor", fullgraph=True)
    x = torch.randn(2, 5, 32, requires_grad=True)
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    upstream = torch.randn(2, 5, 32)
    expected, actual = (
        (output.detach(), *torch.autograd.grad(output, inputs, upstream)) for output in (block(x), compiled(x))
    )
    assert len(actual) > 2
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
