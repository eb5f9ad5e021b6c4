"""Costs counted without memory, against models that are allocated, run and measured."""

from __future__ import annotations

import copy
import json
import math
import random
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from lorakit import FisherLoRAConfig, SpecLoRAConfig, cost
from lorakit.errors import UnsupportedModelError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LINEAR = {"r": 4, "target_modules": "all-linear"}
CONFIGS = {
    "lora": LoraConfig(**LINEAR),
    "rank pattern": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, lora_bias=True),
    "dora": LoraConfig(**LINEAR, use_dora=True, lora_dropout=0.1),
    "fisherlora": FisherLoRAConfig(r=8, r_q=2),
    "speclora": SpecLoRAConfig(**LINEAR, k=20),
    "pissa": LoraConfig(**LINEAR, init_lora_weights="pissa"),
    "in full": LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"], bias="all"),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"]),
    "task": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(8))


def measured(model, inputs):
    """On the CPU: FLOPs of a forward pass, FLOPs of a step, and the bytes that autograd saved."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    graph = weakref.WeakSet()

    class Held:  # what the graph still holds after the forward pass
        def __init__(self, tensor):
            self.storage, self.tensor = tensor.untyped_storage(), tensor
            graph.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        loss = model(**inputs).loss
    kept = {held.storage.data_ptr(): held.storage.nbytes() for held in graph}
    saved = sum(size for pointer, size in kept.items() if pointer not in own)
    with FlopCounterMode(display=False) as counter:
        loss = model(**inputs).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops(), saved


def state_bytes(model, optimizer):
    """The bytes of an optimizer's states after a step."""
    optimizer.step()
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_against_an_allocated_model(kind, tiny_llama):
    base = tiny_llama(attn_implementation="eager")
    found = cost.accounting(base, CONFIGS[kind], batch_size=2, sequence_length=9)
    inputs = {"input_ids": IDS, "labels": IDS}
    full = measured(copy.deepcopy(base).train().requires_grad_(True), inputs)
    model = get_peft_model(base, CONFIGS[kind]).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert found.trainable_params == sum(p.numel() for p in trainable)
    assert found.base_params == base_params(tiny_llama())
    total = sum(p.numel() for p in model.parameters())
    assert found.adapter_params == total - found.base_params
    assert found.ratio == found.trainable_params / found.base_params
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    rows = {row.module_name: row for row in found.modules if not row.in_full}
    assert rows.keys() == layers.keys()
    for name, row in rows.items():
        layer = layers[name]
        own = {id(p) for p in layer.get_base_layer().parameters()}
        assert row.params == sum(p.numel() for p in layer.parameters() if id(p) not in own)
        assert (row.rank, row.d_in, row.d_out) == (layer.r["default"], layer.in_features, layer.out_features)
    assert [row.module_name for row in found.modules if row.in_full] == (["lm_head"] if kind == "in full" else [])
    assert sum(row.params for row in found.modules) == found.trainable_params

    lora = measured(model, inputs)
    assert found.not_run is None
    assert (found.flops.forward, found.flops.step) == lora[:2]
    assert (found.base_flops.forward, found.base_flops.step) == full[:2]
    assert found.adapter_flops == lora[0] - full[0]
    assert sum(row.multiply_adds or 0 for row in found.modules) * 2 * IDS.numel() == pytest.approx(found.adapter_flops)
    assert found.memory_full.activations == full[2]
    # SpecLoRA takes a weight on the meta device for an offloaded one, and copies its k × k block
    copied = 14 * 20 * 20 * 4 if kind == "speclora" else 0
    assert lora[2] <= found.memory.activations <= lora[2] + copied

    assert found.memory.gradients == sum(p.grad.nbytes for p in trainable if p.grad is not None)
    assert found.memory.optimizer == state_bytes(model, torch.optim.AdamW(trainable))
    assert found.memory.weights == 4 * found.base_params
    assert found.memory.adapter >= 4 * found.adapter_params
    assert found.memory.total == sum(
        getattr(found.memory, name) for name in ("weights", "adapter", "gradients", "optimizer", "activations")
    )


def base_params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_and_other_optimizers(tiny_gpt2, dtype):
    model = tiny_gpt2().to(dtype)  # tied embeddings
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    for name, optimizer in (
        ("adamw", torch.optim.AdamW(model.parameters())),
        ("sgd", torch.optim.SGD(model.parameters())),
        ("sgd_momentum", torch.optim.SGD(model.parameters(), momentum=0.9)),
    ):
        found = cost.accounting(model, config, optimizer=name, sequence_length=9)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert found.memory_full.optimizer == state_bytes(model, optimizer)
        assert found.memory_full.gradients == sum(p.grad.nbytes for p in model.parameters())
        assert found.memory_full.weights == sum(p.nbytes for p in model.parameters())
        assert found.memory_full.adapter == 0


def test_linear_layers_counted_by_hand():
    n, d, h, r = 7, 12, 20, 3
    model = nn.Sequential(nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False))
    found = cost.accounting(model, LoraConfig(r=r, target_modules=["0", "1"]), inputs={"input": torch.ones(n, d)})
    base, adapter = 2 * d * h, 2 * r * (d + h)  # multiply-adds an example
    assert found.base_flops.forward == 2 * n * base
    assert found.base_flops.step == 2 * n * (base + base + d * h)  # all weights' gradients, and the second's input's
    assert found.flops.forward == 2 * n * (base + adapter)
    # backward: both factors' gradients, what goes from B to A, and the second layer's input's, through base and A
    assert found.flops.step == 2 * n * (base + adapter + adapter + r * h + r * d + d * h + r * h)
    assert [row.multiply_adds for row in found.modules] == [r * (d + h)] * 2
    assert [row.params for row in found.modules] == [r * (d + h)] * 2
    assert (found.batch_size, found.sequence_length) == (n, None)


@pytest.mark.slow
def test_attention_without_a_mask_counts_as_the_flash_kernel(tiny_llama):
    s, heads, layers = 48, 4, 2
    eager = cost.accounting(tiny_llama(attn_implementation="eager"), CONFIGS["lora"], sequence_length=s)
    flash = cost.accounting(tiny_llama(), CONFIGS["lora"], sequence_length=s)
    assert flash.flops.forward == eager.flops.forward
    assert flash.flops.step == eager.flops.step + layers * 2 * s * s * 32  # the scores are computed again
    scores = 4 * layers * heads * s * s
    assert eager.memory.activations - flash.memory.activations > scores
    assert flash.memory.activations < eager.memory.activations


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_implementations_that_are_not_installed(implementation):
    plain = LlamaConfig(**SMALL)
    other = LlamaConfig(**SMALL, attn_implementation=implementation)
    assert cost.accounting(other, CONFIGS["lora"]).flops == cost.accounting(plain, CONFIGS["lora"]).flops
    assert other._attn_implementation == implementation


@pytest.mark.slow
def test_all_forms_of_a_model_give_the_same_and_none_is_changed(tiny_llama, tmp_path):
    model = tiny_llama(torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config)).to(torch.bfloat16)
    config = LoraConfig(**LINEAR, task_type="CAUSAL_LM")
    before = (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(id(m), m.training, sorted(vars(m))) for m in model.modules()],
        (torch.get_rng_state().tolist(), random.getstate()),
        copy.deepcopy(vars(config)),
    )
    found = [
        cost.accounting(form, config) for form in (model, model.config, str(tmp_path), tmp_path / "config.json", shell)
    ]
    assert all(one == found[0] for one in found)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert before[1:] == (
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(id(m), m.training, sorted(vars(m))) for m in model.modules()],
        (torch.get_rng_state().tolist(), random.getstate()),
        vars(config),
    )
    assert all(p.is_meta for p in shell.parameters())
    assert not any(isinstance(m, BaseTunerLayer) for m in shell.modules())


@pytest.mark.slow
def test_a_config_without_cache_can_be_run():
    """Trainer writes `use_cache` false into configs; transformers then looks at the values of position ids."""
    config = LlamaConfig(**SMALL, use_cache=False)
    assert cost.accounting(config, CONFIGS["lora"]) == cost.accounting(LlamaConfig(**SMALL), CONFIGS["lora"])
    assert config.use_cache is False


@pytest.mark.slow
def test_dtypes(tiny_llama):
    half = cost.accounting(LlamaConfig(**SMALL), CONFIGS["lora"])  # which names no dtype
    assert half.memory.weights == 2 * half.base_params
    assert half.memory.adapter == 4 * half.adapter_params  # PEFT keeps adapters in float32
    assert "bfloat16, of the adapter in float32" in half.assumptions[0]
    params = base_params(tiny_llama())
    assert cost.accounting(tiny_llama(), CONFIGS["lora"], dtype=torch.float16).memory.weights == 2 * params
    assert cost.accounting(tiny_llama(), CONFIGS["lora"]).memory.weights == 4 * params


@pytest.mark.slow
def test_encoder_decoders_and_classifiers():
    settings = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    config = T5Config(**settings, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"])
    found = cost.accounting(
        config, LoraConfig(r=4, target_modules=["q"]), batch_size=2, sequence_length=9, dtype=torch.float32
    )
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=4, target_modules=["q"])).train()
    assert (found.flops.forward, found.flops.step) == measured(model, {"input_ids": IDS, "labels": IDS})[:2]
    config = LlamaConfig(**SMALL, architectures=["LlamaForSequenceClassification"], pad_token_id=0)
    found = cost.accounting(config, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert found.model == "LlamaForSequenceClassification"
    assert [row.module_name for row in found.modules if row.in_full] == ["score"]


@pytest.mark.slow
@pytest.mark.parametrize("beside", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}])
def test_shared_parameters_of_tied_modules_count_once(beside):
    lora = LoraConfig(r=4, target_modules=["q_proj"], ensure_weight_tying=True, **beside)
    found = cost.accounting(LlamaConfig(**SMALL, tie_word_embeddings=True), lora, sequence_length=4)
    tied = [row for row in found.modules if row.in_full]
    assert [row.module_name for row in tied] == ["model.embed_tokens", "lm_head"]
    assert (tied[0].params > 0, tied[1].params) == (True, 0)
    assert sum(row.params for row in found.modules) == found.trainable_params


@pytest.mark.slow
def test_experts():
    shape = SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    s, expert = 16, 3 * 32 * 48  # multiply-adds of an expert for a token
    attention = LoraConfig(r=2, target_modules=["q_proj"])
    dense = cost.accounting(LlamaConfig(**SMALL, num_key_value_heads=2), attention, sequence_length=s)
    found = cost.accounting(MixtralConfig(**shape), attention, sequence_length=s)
    router = 4 * 32
    assert found.base_flops.forward == dense.base_flops.forward + 2 * s * 2 * (2 * expert - expert + router)
    per_layer = found.base_flops.step - 3 * found.base_flops.forward
    assert per_layer == dense.base_flops.step - 3 * dense.base_flops.forward  # each product's two gradients

    targets = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    found = cost.accounting(MixtralConfig(**shape), targets, sequence_length=s)
    with torch.random.fork_rng():
        model = get_peft_model(MixtralForCausalLM(MixtralConfig(**shape)), targets)
    assert found.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row.params for row in found.modules) == found.trainable_params
    assert {row.module_name.rpartition(".")[2] for row in found.modules} == {"q_proj", "gate_up_proj", "down_proj"}
    # PEFT's parametrization asks for autocast, which the meta device does not have
    assert (found.flops, found.memory.activations) == (None, None)
    assert found.base_flops is not None
    assert found.not_run
    assert f"not run: {found.not_run}" in found.explain()
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.plot().axes


@pytest.mark.slow
def test_nothing_is_allocated(run_python):
    code = """
        import json, resource, torch
        from peft import LoraConfig
        from transformers import LlamaConfig
        from lorakit import cost
        config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                             num_key_value_heads=8, vocab_size=128256)
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        cost.accounting(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1), lora)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = cost.accounting(config, lora)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([found.base_params, found.trainable_params, found.memory.total, (after - before) * 1024]))
    """
    base, trainable, memory, grown = json.loads(run_python(code).stdout.strip().splitlines()[-1])
    assert base == 8_030_261_248  # as Llama-3.1-8B has
    assert trainable == 32 * 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert memory > 16e9
    assert grown < 200e6


@pytest.mark.slow
def test_invalid_arguments_are_refused(tiny_llama):
    lora = CONFIGS["lora"]
    with pytest.raises(ValueError, match="`optimizer` must be one of adamw, adamw_8bit, sgd, sgd_momentum; got 'lion'"):
        cost.accounting(tiny_llama(), lora, optimizer="lion")
    with pytest.raises(ValueError, match="`sequence_length` must be a positive integer; got 0"):
        cost.accounting(tiny_llama(), lora, sequence_length=0)
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer; got True"):
        cost.accounting(tiny_llama(), lora, batch_size=True)
    with pytest.raises(ValueError, match="`inputs` must map argument names to tensors"):
        cost.accounting(tiny_llama(), lora, inputs={})
    with pytest.raises(ValueError, match="`inputs` must map argument names to tensors"):
        cost.accounting(tiny_llama(), lora, inputs=[IDS])
    with pytest.raises(TypeError, match="`config` must be a PEFT config; got dict"):
        cost.accounting(tiny_llama(), {"r": 4})
    with pytest.raises(TypeError, match="`dtype` must be a torch dtype, such as torch.bfloat16; got 'bfloat16'"):
        cost.accounting(tiny_llama(), lora, dtype="bfloat16")
    with pytest.raises(UnsupportedModelError, match="'no/such/model' has no config"):
        cost.accounting("no/such/model", lora)
    with pytest.raises(
        UnsupportedModelError, match="The model class of a T5Config is not known. Set its `architecture"
    ):
        cost.accounting(T5Config(), lora)
    with pytest.raises(TypeError, match="`model` must be a transformers config, a path or a model; got int"):
        cost.accounting(3, lora)
    with pytest.raises(UnsupportedModelError, match="`model` must be a base model; this one has adapters already"):
        cost.accounting(get_peft_model(tiny_llama(), lora), lora)
    quantized = LlamaConfig(**SMALL, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match="Pass its config without `quantization_config`"):
        cost.accounting(quantized, lora)
    with pytest.raises(ValueError, match="Target modules .* not found"):
        cost.accounting(tiny_llama(), LoraConfig(target_modules=["nothing"]))


def test_a_model_whose_inputs_are_unknown_is_not_run():
    model = nn.Sequential(nn.Linear(4, 4))
    found = cost.accounting(model, LoraConfig(r=2, target_modules=["0"]))
    assert (found.flops, found.base_flops, found.memory.activations, found.sequence_length) == (None,) * 4
    assert found.not_run == "Sequential does not take token ids; pass `inputs`."
    assert found.modules[0].multiply_adds is None
    assert found.trainable_params == 16


@pytest.mark.slow
def test_the_report(tiny_llama):
    found = cost.accounting(tiny_llama(), FisherLoRAConfig(r=8, r_q=2), sequence_length=16)
    text = found.explain()
    assert text.splitlines()[1].split() == ["query", "2", "2", "256", "256"]
    assert text.splitlines()[2].split() == ["value", "2", "8", "768", "768"]
    assert (
        f"FISHERLORA on LlamaForCausalLM: 1,024 trainable parameters, {found.base_params:,} in the base model" in text
    )
    assert "optimizer states (adamw): two moments an entry and one step a tensor, as torch keeps them" in text
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["memory"]["total"] == found.memory.total
    assert read["modules"][0]["multiply_adds"] == 2 * 64
    assert read["ratio"] == pytest.approx(1024 / found.base_params)
    assert found.headline.startswith("FISHERLORA on LlamaForCausalLM: 1.02k trainable of ")
    assert found.details[0] == "batch of 1 × 16, adamw"
    assert len(repr(found).splitlines()) <= 10
    assert found.to_frame()["params"].sum() == 1024
    figure = found.plot()
    left, right = figure.axes
    assert figure.get_suptitle() == "FISHERLORA on LlamaForCausalLM"
    assert (left.get_xlabel(), right.get_xlabel()) == ("KiB", "trainable parameters")
    widths = [patch.get_width() for patch in left.patches]
    assert math.fsum(widths) * 2**10 == pytest.approx(found.memory.total + found.memory_full.total)
    assert [patch.get_width() for patch in right.patches] == [256, 768]
    assert [text.get_text() for text in right.texts] == ["256", "768"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd_momentum"])
def test_fp32_copies_and_states_of_half_precision_weights_count_on_request(optimizer):
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).bfloat16()
    config, inputs = LoraConfig(r=2, target_modules=["0"]), {"input": torch.ones(3, 6, dtype=torch.bfloat16)}
    plain, master = (
        cost.accounting(model, config, inputs=inputs, optimizer=optimizer, fp32_master=flag) for flag in (False, True)
    )
    moments, steps = (2, 4) if optimizer == "adamw" else (1, 0)
    assert (plain.memory_full.master, plain.memory_full.optimizer) == (0, moments * 24 * 2 + steps)
    assert (master.memory_full.master, master.memory_full.optimizer) == (4 * 24, moments * 24 * 4 + steps)
    assert master.memory_full.total - plain.memory_full.total == 4 * 24 + moments * 24 * 2
    adapter_in_fp32 = sum(p.numel() for p in get_peft_model(model, config).parameters() if p.dtype == torch.float32)
    assert adapter_in_fp32 == 20  # PEFT trains the adapter in fp32, so it needs no copy
    assert master.memory == plain.memory
    assert any("an fp32 copy of every trained half-precision weight" in line for line in master.assumptions)
