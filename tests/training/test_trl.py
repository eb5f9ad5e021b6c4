"""TRL's SFTTrainer and DPOTrainer, given our configs as `peft_config`, and DPO's two kinds of reference."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close_outputs
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

STEPS = 3

# Gradient checkpointing, on by TRL's default, has new names in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture
def preferences(sentences):
    """Prompts with two answers each."""
    lines = sentences(24)
    rows = zip(lines[0::3], lines[1::3], lines[2::3], strict=True)
    return Dataset.from_list([{"prompt": p, "chosen": " " + a, "rejected": " " + b} for p, a, b in rows])


@pytest.fixture
def options(tmp_path):
    """What both trainers are told; the rest are TRL's defaults, gradient checkpointing among them."""
    return {
        "output_dir": tmp_path / "run",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


@pytest.fixture
def make_dpo(options, preferences, tokenizer):
    def make(model, config=None):
        return DPOTrainer(
            model,
            args=DPOConfig(**options),
            train_dataset=preferences,
            processing_class=tokenizer,
            peft_config=config,
        )

    return make


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


@torch.no_grad()
def answer_log_probs(model, batch):
    """The log probability of each answer, from the logits."""
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (log_probs * batch["completion_mask"][:, 1:]).sum(-1)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_trained_and_saved(trainer, before, trainable, load, token_ids, dtype=torch.float32):
    after = trainable(trainer.model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert not torch.equal(value, before[name]), f"{name} was not trained"
    trainer.save_model()
    loaded = load(trainer.args.output_dir, dtype)
    assert type(loaded.peft_config["default"]) is type(trainer.model.peft_config["default"])
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without its autocast
    assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sft(dtype, make_config, tiny_llama, options, sentences, tokenizer, trainable, load, token_ids):
    trainer = SFTTrainer(
        tiny_llama(dtype),
        args=SFTConfig(**options | {"bf16": dtype == torch.bfloat16}),
        train_dataset=Dataset.from_dict({"text": sentences(24)}),
        processing_class=tokenizer,
        peft_config=make_config(),
    )
    before = trainable(trainer.model)
    assert all(value.dtype == torch.float32 for value in before.values())
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    for name, value in frozen.items():
        assert torch.equal(trainer.model.get_parameter(name), value), f"{name} is frozen"
    check_trained_and_saved(trainer, before, trainable, load, token_ids, dtype)


@pytest.mark.slow
def test_dpo(make_any_config, make_dpo, tiny_llama, trainable, load, token_ids):
    trainer = make_dpo(tiny_llama(), make_any_config())
    assert trainer.ref_model is None
    before = trainable(trainer.model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < math.log(2) - 1e-3
    check_trained_and_saved(trainer, before, trainable, load, token_ids)


@pytest.mark.slow
def test_the_reference_of_a_peft_config_is_the_base_model(make_any_config, make_dpo, tiny_llama, randomize):
    trainer = make_dpo(tiny_llama(), make_any_config())
    randomize(trainer.model, std=0.5)
    batch = first_batch(trainer)
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(reference, answer_log_probs(tiny_llama(), batch), rtol=0, atol=1e-4)
    assert (reference - answer_log_probs(trainer.model, batch)).abs().max() > 0.1


@pytest.mark.slow
def test_the_reference_of_a_trained_adapter_is_a_copy_of_it(
    make_any_config, make_dpo, trained, trainable, load, token_ids
):
    model = trained(make_any_config())
    start = trainable(model)
    trainer = make_dpo(model)
    assert set(model.peft_config) == {"default", "ref"}
    batch = first_batch(trainer)
    expected = answer_log_probs(model, batch)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < math.log(2) - 1e-3
    for name, value in start.items():
        copy = model.get_parameter(name.replace(".default.", ".ref."))
        assert torch.equal(copy, value)
        assert not copy.requires_grad
    reference = torch.cat(trainer.compute_ref_log_probs(model, batch))
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-4)
    check_trained_and_saved(trainer, start, trainable, load, token_ids)


@pytest.mark.slow
def test_a_saved_reference_loads_beside_the_policy(make_config, make_dpo, trained, tiny_llama, token_ids):
    model = trained(make_config())
    trainer = make_dpo(model)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), f"{trainer.args.output_dir}/ref", adapter_name="ref").eval()
    model.eval().set_adapter("ref")
    assert_close_outputs(loaded(input_ids=token_ids).logits, model(input_ids=token_ids).logits)
