"""SpectralCallback in transformers' Trainer and TRL's, and the trajectory it writes."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorakit import FisherLoRAConfig, SpecLoRAConfig, lens
from lorakit.lens import SpectralCallback, Trajectory

CONFIGS = {
    "LORA": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1),
    "FISHERLORA": lambda: FisherLoRAConfig(r=4, r_q=2, lora_dropout=0.1),
    "SPECLORA": lambda: SpecLoRAConfig(r=4, k=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
}


class Logger(TrainerCallback):
    """Stands for TensorBoard's and the like, which Trainer calls before callbacks of its user."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.fixture
def make_trainer(tiny_llama, tmp_path):
    def make(callbacks=(), config=CONFIGS["LORA"], name="run", first=(), **options):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config())
        ids = torch.randint(1, 64, (16, 8), generator=torch.Generator().manual_seed(3))
        defaults = {
            "output_dir": str(tmp_path / name),
            "max_steps": 7,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        trainer = Trainer(
            model,
            TrainingArguments(**defaults | options),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[*first, *callbacks],
        )
        return trainer

    return make


def steps(trajectory):
    return [one.step for one in trajectory.snapshots]


def test_it_looks_at_the_start_at_every_n_steps_and_at_the_end(make_trainer, tmp_path):
    callback = SpectralCallback(every=3, also=[1])
    trainer = make_trainer([callback])
    trainer.train()
    assert steps(callback.trajectory) == [0, 1, 3, 6, 7]
    assert Trajectory.read(tmp_path / "run" / "spectra.jsonl") == callback.trajectory
    last = callback.trajectory.snapshots[-1]
    now = lens.snapshot(trainer.model, step=7)
    assert [row.effective_rank for row in now.modules] == [row.effective_rank for row in last.modules]
    first = callback.trajectory.snapshots[0]
    assert {row.capacity_utilization for row in first.modules} == {0.0}
    assert all(0 < row.kappa <= 1 for row in last.modules)


def test_loggers_see_it_and_the_trainer_logs_as_without_it(make_trainer):
    logger = Logger()
    callback = SpectralCallback(every=2)
    trainer = make_trainer([callback], first=[logger])
    trainer.train()
    spectral = [(step, logs) for step, logs in logger.seen if "spectral/cu" in logs]
    assert [step for step, _ in spectral] == [0, 2, 4, 6, 7]
    for (_, logs), seen in zip(spectral, callback.trajectory.snapshots, strict=True):
        assert {key: value for key, value in logs.items() if key != "epoch"} == seen.metrics()
    assert [step for step, logs in logger.seen if "loss" in logs] == [2, 4, 6]
    history = [row for row in trainer.state.log_history if "spectral/cu" in row]
    assert [row["step"] for row in history] == [0, 2, 4, 6, 7]
    assert history[-1]["spectral/qv_gap"] == callback.trajectory.snapshots[-1].qv_gap


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_training_is_bit_for_bit_as_without_it(make_trainer, kind, options):
    trained = []
    for number, callbacks in enumerate(([], [SpectralCallback(every=2)])):
        trainer = make_trainer(callbacks, CONFIGS[kind], name=f"{number}", **options)
        trainer.train()
        trained.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
        layers = [module for module in trainer.model.modules() if hasattr(module, "lora_A")]
        assert layers
        assert not any(layer._forward_hooks for layer in layers)
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_overlap_is_of_all_micro_batches(make_trainer):
    """Accumulated over two micro-batches, it is that of the two as one batch."""
    found = []
    for number, (size, accumulated) in enumerate(((4, 1), (2, 2))):
        callback = SpectralCallback(every=1)
        make_trainer(
            [callback],
            name=str(number),
            config=lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        ).train()
        found.append([row.kappa for row in callback.trajectory.snapshots[-1].modules])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_without_gradients_there_is_no_kappa(make_trainer):
    callback = SpectralCallback(every=2, gradients=False)
    make_trainer([callback]).train()
    assert all(row.kappa is None for one in callback.trajectory.snapshots for row in one.modules)


def test_log_modules(make_trainer):
    callback = SpectralCallback(every=2, log_modules=True)
    trainer = make_trainer([callback])
    trainer.train()
    name = callback.trajectory.snapshots[-1].modules[0].module_name
    assert any(f"spectral/cu/{name}" in row for row in trainer.state.log_history)


def test_resuming_goes_on_in_the_same_file(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = SpectralCallback(every=1)
    make_trainer([whole], **options).train()
    path = tmp_path / "run" / "spectra.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "mod')  # cut off in writing
    assert steps(Trajectory.read(path)) == list(range(8))
    resumed = SpectralCallback(every=1)
    make_trainer([resumed], **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert steps(Trajectory.read(path)) == list(range(8))
    assert resumed.trajectory == Trajectory.read(path)
    for one, other in zip(whole.trajectory.snapshots, resumed.trajectory.snapshots, strict=True):
        assert one.qv_gap == pytest.approx(other.qv_gap, abs=1e-6)


def test_a_new_training_keeps_the_file_that_is_there(make_trainer, tmp_path):
    for _ in range(2):
        make_trainer([SpectralCallback(every=4)]).train()
    assert steps(Trajectory.read(tmp_path / "run" / "spectra.jsonl")) == [0, 4, 7]
    assert steps(Trajectory.read(tmp_path / "run" / "spectra-1.jsonl")) == [0, 4, 7]


def test_it_looks_where_training_stopped_early(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    callback = SpectralCallback(every=3)
    make_trainer([callback, Stop()]).train()
    assert steps(callback.trajectory) == [0, 3, 5]


def test_a_compiled_model_has_no_kappa_and_says_so(make_trainer):
    callback = SpectralCallback(every=2)
    trainer = make_trainer([callback], max_steps=2)
    trainer.model.get_base_model().model.layers[0].mlp.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"no gradient-subspace overlap \(kappa\)"):
        trainer.train()
    last = callback.trajectory.snapshots[-1]
    assert last.total.kappa is None
    assert last.total.capacity_utilization > 0


def test_sft_trainer(tiny_llama, tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    callback = SpectralCallback(every=2)
    trainer = SFTTrainer(
        tiny_llama(),
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False
        ),
        train_dataset=Dataset.from_dict({"text": ["a b a b", "b b a"] * 8}),
        processing_class=tokenizer,
        peft_config=CONFIGS["FISHERLORA"](),
        callbacks=[callback],
    )
    trainer.train()
    assert steps(Trajectory.read(tmp_path / "spectra.jsonl")) == [0, 2, 4]
    assert callback.trajectory.snapshots[-1].role("query").kappa > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be an integer of at least 1; got 0"),
        ({"every": 2.5}, "`every` must be an integer of at least 1; got 2.5"),
        ({"projections": 1}, "`projections` must be an integer of at least 2; got 1"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralCallback(**options)


def test_a_model_without_an_adapter_is_refused_before_training(tiny_llama, make_trainer, tmp_path):
    trainer = make_trainer([SpectralCallback()])
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = tiny_llama()
    with pytest.raises(TypeError, match="must be a peft.PeftModel"):
        trainer.train()
    assert not (tmp_path / "run" / "spectra.jsonl").exists()


# the file and the plot


@pytest.fixture
def trajectory(make_trainer):
    callback = SpectralCallback(every=2)
    make_trainer([callback]).train()
    return callback.trajectory


def test_series(trajectory):
    at, values = trajectory.series("spectral/cu_value")
    assert at == [0, 2, 4, 6, 7]
    assert values == [one.role("value").capacity_utilization for one in trajectory.snapshots]
    with pytest.raises(ValueError, match="`metric` must be one of spectral/cu, .*got 'cu'"):
        trajectory.series("cu")


def test_the_plot_shows_roles_gap_and_overlap(trajectory):
    left, middle, right = trajectory.plot().axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["query", "value", "down"]
    query = left.lines[0]
    assert list(query.get_xdata()) == [0, 2, 4, 6, 7]
    assert list(query.get_ydata()) == pytest.approx(trajectory.series("spectral/cu_query")[1])
    assert list(middle.lines[1].get_ydata()) == [one.qv_gap for one in trajectory.snapshots]
    assert list(right.lines[0].get_ydata()) == trajectory.series("spectral/kappa_query")[1]
    assert len(Trajectory(tuple(trajectory.snapshots[:1])).plot().axes) == 2  # κ was not there yet
    with pytest.raises(ValueError, match="no snapshot to plot"):
        Trajectory(()).plot()


def test_trajectories_as_plain_data(trajectory):
    plain = json.loads(json.dumps(trajectory.to_dict(), allow_nan=False))
    assert [one["step"] for one in plain["snapshots"]] == [0, 2, 4, 6, 7]


def test_a_file_with_something_else_in_it(tmp_path, trajectory):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"loss": 1}\n' + json.dumps(trajectory.snapshots[0].to_dict()) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: .*no snapshot"):
        Trajectory.read(path)
