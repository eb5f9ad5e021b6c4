"""transformers' Trainer: saving, resuming, the best checkpoint, gradient accumulation."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_outputs
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

STEPS, HALF = 6, 3


class LossTrainer(Trainer):
    """Keeps the loss of every training step, unrounded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


@pytest.fixture
def make_trainer(tiny_llama, examples, tmp_path):
    def make(config, name="run", seed=0, **options):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama(), config)
        defaults = {
            "output_dir": tmp_path / name,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "weight_decay": 0.1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return LossTrainer(
            model,
            TrainingArguments(**defaults | options),
            train_dataset=examples[:16],
            eval_dataset=examples[16:],
        )

    return make


@pytest.mark.slow
def test_resuming_continues_the_loss_curve(make_config, make_trainer, trainable):
    whole = make_trainer(make_config(lora_dropout=0.1), save_steps=HALF)
    whole.train()
    resumed = make_trainer(make_config(lora_dropout=0.1), "resumed", seed=1)  # other initial values, to be overwritten
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{HALF}")
    assert len(whole.losses) == STEPS
    assert len(set(whole.losses)) == STEPS
    assert resumed.losses == pytest.approx(whole.losses[HALF:], abs=1e-6)
    expected = trainable(whole.model)
    for name, value in trainable(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_checkpoint_holds_every_parameter_that_is_trained(make_any_config, make_trainer, load, examples, trainable):
    trainer = make_trainer(make_any_config(), save_steps=HALF)
    before = trainable(trainer.model)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{STEPS}"
    saved = load_file(f"{checkpoint}/adapter_model.safetensors")
    after = {name.replace(".default", ""): value for name, value in trainable(trainer.model).items()}
    assert saved.keys() == after.keys()
    for name, value in before.items():
        name = name.replace(".default", "")
        assert torch.equal(saved[name], after[name])
        assert not torch.equal(saved[name], value), f"{name} was not trained"
    batch = {key: value[None] for key, value in examples[0].items()}
    assert_close_outputs(load(checkpoint)(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(make_config, make_trainer, trainable):
    # The highest loss counts as the best here, so that the first checkpoint is, not the last.
    trainer = make_trainer(
        make_config(),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    directory = trainer.args.output_dir
    assert trainer.state.best_model_checkpoint == f"{directory}/checkpoint-2"
    best, last = (load_file(f"{directory}/checkpoint-{n}/adapter_model.safetensors") for n in (2, STEPS))
    for name, value in trainable(trainer.model).items():
        name = name.replace(".default", "")
        assert torch.equal(value, best[name])
        assert not torch.equal(value, last[name])


def test_half_batches_accumulate_to_the_whole_batch_s_gradient(make_any_config, trained, gradients, examples):
    model = trained(make_any_config()).double().train()
    batch = {key: torch.stack([example[key] for example in examples[:4]]) for key in examples[0]}
    tokens = (batch["labels"][:, 1:] != -100).sum()
    expected = gradients(model, **batch, num_items_in_batch=tokens)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        model(**{key: value[half] for key, value in batch.items()}, num_items_in_batch=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_trainer_s_gradient_accumulation_changes_nothing(make_config, make_trainer, trainable):
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 1.0}
    trainers = [
        make_trainer(
            make_config(), name, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options
        )
        for name, size, steps in (("whole", 4, 1), ("halves", 2, 2))
    ]
    before = trainable(trainers[0].model)
    for trainer in trainers:
        trainer.train()
    whole, halves = (trainable(trainer.model) for trainer in trainers)
    for name, value in whole.items():
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(halves[name], value, rtol=0, atol=1e-6, msg=name)
