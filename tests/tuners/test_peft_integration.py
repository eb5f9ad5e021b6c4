"""Both types through the doors of PEFT and transformers by which a LoRA comes and goes."""

from __future__ import annotations

import json

import pytest
import torch
from closeness import assert_close_outputs
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModelForCausalLM

from lorakit import FisherLoRAConfig, SpecLoRAConfig

CONFIGS = {
    "SPECLORA": lambda: SpecLoRAConfig(r=2, k=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "FISHERLORA": lambda: FisherLoRAConfig(r=6, r_q=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


@pytest.fixture
def saved(config, tiny_llama, randomize, token_ids, tmp_path):
    """A base model and an adapter of it on disk, and what they make of `token_ids`."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(loaded, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model(input_ids=token_ids).logits.detach()


def test_peft_classes_load_it(saved, config, token_ids):
    base, adapter, expected = saved
    loaded = PeftConfig.from_pretrained(adapter)
    assert type(loaded) is type(config)
    assert loaded.base_model_name_or_path == str(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert isinstance(model, PeftModelForCausalLM)
    assert_close_outputs(model.eval()(input_ids=token_ids).logits, expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert_close_outputs(auto.eval()(input_ids=token_ids).logits, expected)
    assert get_model_status(auto).peft_types == {"default": config.peft_type.value}
    assert all(status.enabled for status in get_layer_status(auto))


def test_transformers_loads_it_natively(saved, token_ids):
    base, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    assert torch.allclose(model.eval()(input_ids=token_ids).logits, expected, atol=1e-6)
    direct = AutoModelForCausalLM.from_pretrained(adapter)
    assert torch.allclose(direct.eval()(input_ids=token_ids).logits, expected, atol=1e-6)


def test_transformers_adds_trains_and_saves_it_natively(config, tiny_llama, randomize, token_ids, tmp_path):
    model = tiny_llama()
    model.add_adapter(config, adapter_name="mine")
    randomize(model)
    model.eval()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)
    expected = model(input_ids=token_ids).logits
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    other.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.allclose(other(input_ids=token_ids).logits, expected, atol=1e-6)
    model.disable_adapters()
    assert_close_outputs(model(input_ids=token_ids).logits, tiny_llama()(input_ids=token_ids).logits)


def test_a_step_of_training_lowers_the_loss(config, tiny_llama, token_ids):
    model = get_peft_model(tiny_llama(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    grown = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_spec" in name]
    assert all(p.abs().sum() > 0 for p in grown)


def test_merge_and_unload(config, tiny_llama, randomize, token_ids):
    model = randomize(get_peft_model(tiny_llama(), config)).eval()
    expected = model(input_ids=token_ids).logits
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert torch.allclose(merged(input_ids=token_ids).logits, expected, atol=1e-5)


def test_injection_without_a_peft_model(config, tiny_llama, token_ids):
    model = inject_adapter_in_model(config, tiny_llama())
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert_close_outputs(model(input_ids=token_ids).logits, tiny_llama()(input_ids=token_ids).logits)


def test_generation(config, tiny_llama, randomize, token_ids):
    model = randomize(get_peft_model(tiny_llama(), config)).eval()
    generated = model.generate(input_ids=token_ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 10)


@pytest.mark.slow
def test_without_lorakit_the_type_is_unknown_and_nothing_else(saved, run_python):
    _, adapter, _ = saved
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(adapter)!r})"
    done = run_python(code, check=False)
    assert "KeyError" in done.stderr
    assert run_python(f"import lorakit; {code}; print('loaded')").stdout.strip() == "loaded"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] in CONFIGS


@pytest.mark.parametrize("cls", [FisherLoRAConfig, SpecLoRAConfig])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_peft_adds_to_the_modules_to_save(cls, task_type, randomize, token_ids, tmp_path):
    """PEFT's model classes name them after the adapter is there, in the config that they were given."""
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    model_cls = {
        "SEQ_CLS": BertForSequenceClassification,
        "TOKEN_CLS": BertForTokenClassification,
        "QUESTION_ANS": BertForQuestionAnswering,
    }[task_type]

    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return model_cls(BertConfig(vocab_size=64, **sizes)).eval()

    options = {"k": 4} if cls is SpecLoRAConfig else {}
    model = randomize(get_peft_model(base(), cls(r=4, task_type=task_type, **options))).eval()
    head = "qa_outputs" if task_type == "QUESTION_ANS" else "classifier"
    assert head in model.peft_config["default"].modules_to_save
    expected = model(input_ids=token_ids)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert head in loaded.peft_config["default"].modules_to_save
    assert_close_outputs(loaded(input_ids=token_ids)[0], expected)
