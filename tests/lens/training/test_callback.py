"""SpectralCallback in transformers' Trainer and TRL's, and the trajectory it writes."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from matplotlib.colors import to_rgb
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import lorakit
from lorakit import FisherLoRAConfig, SpecLoRAConfig, lens
from lorakit.lens import SpectralCallback, Trajectory

CONFIGS = {
    "LORA": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1),
    "FISHERLORA": lambda: FisherLoRAConfig(r=4, r_q=2, lora_dropout=0.1),
    "SPECLORA": lambda: SpecLoRAConfig(r=4, k=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
}


class Logger(TrainerCallback):
    """Stands for TensorBoard's callback and the like, which Trainer calls before the user's callbacks."""

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
            eval_dataset=[{"input_ids": row, "labels": row} for row in ids[:2]],
            callbacks=list(first),
        )
        for callback in callbacks:
            callback.attach(trainer) if isinstance(callback, SpectralCallback) else trainer.add_callback(callback)
        return trainer

    return make


def steps(trajectory):
    return [one.step for one in trajectory.snapshots]


@pytest.mark.slow
def test_it_measures_at_the_start_every_n_steps_and_at_the_end(make_trainer, tmp_path):
    callback = SpectralCallback(every=3, also=[1])
    trainer = make_trainer([callback])
    trainer.train()
    assert steps(callback.trajectory) == [0, 1, 3, 6, 7]
    assert Trajectory.read(tmp_path / "run" / "spectra.jsonl") == callback.trajectory
    last = callback.trajectory.snapshots[-1]
    now = lens.snapshot(trainer.model, step=7)
    assert [row.effective_rank for row in now.modules] == pytest.approx(
        [row.effective_rank for row in last.modules], rel=1e-5
    )
    first = callback.trajectory.snapshots[0]
    assert {row.capacity_utilization for row in first.modules} == {0.0}
    assert all(0 < row.kappa <= 1 for row in last.modules)


@pytest.mark.slow
@pytest.mark.parametrize("detail", ["summary", "roles", "modules"])
def test_loggers_get_the_metrics_and_the_trainers_own_logs_do_not_change(make_trainer, detail):
    logger = Logger()
    callback = SpectralCallback(every=2, log=detail)
    trainer = make_trainer([callback], first=[logger])
    assert callback in trainer.callback_handler.callbacks
    trainer.train()
    spectral = [(step, logs) for step, logs in logger.seen if "spectral/cu" in logs]
    assert [step for step, _ in spectral] == [0, 2, 4, 6, 7]
    for (_, logs), seen in zip(spectral, callback.trajectory.snapshots, strict=True):
        assert {key: value for key, value in logs.items() if key != "epoch"} == seen.metrics(detail)
    last = set(spectral[-1][1]) - {"epoch"}
    assert {"spectral/cu", "spectral/qv_gap", "spectral/kappa"} <= last
    assert (len(last) == 3) == (detail == "summary")
    assert any("q_proj" in key for key in last) == (detail == "modules")
    assert [step for step, logs in logger.seen if "loss" in logs] == [2, 4, 6]
    history = [row for row in trainer.state.log_history if "spectral/cu" in row]
    assert [row["step"] for row in history] == [0, 2, 4, 6, 7]
    assert history[-1]["spectral/qv_gap"] == callback.trajectory.snapshots[-1].qv_gap
    assert all(row["epoch"] == pytest.approx(row["step"] / 8) for row in history)


@pytest.mark.slow
def test_passed_in_callbacks_it_writes_file_and_history_and_says_once_how_to_reach_the_loggers(make_trainer, tmp_path):
    logger, callback = Logger(), SpectralCallback(every=3)
    trainer = make_trainer(first=[logger, callback])

    def train_twice():
        trainer.train()
        trainer.train()

    with pytest.warns(UserWarning, match=r"call SpectralCallback\(...\).attach\(trainer\) before trainer") as told:
        train_twice()
    assert sum("attach" in str(warning.message) for warning in told) == 1
    assert steps(Trajectory.read(tmp_path / "run" / "spectra.jsonl")) == [0, 3, 6, 7]
    assert [row["step"] for row in trainer.state.log_history if "spectral/cu" in row] == [0, 3, 6, 7]
    assert not any("spectral/cu" in logs for _, logs in logger.seen)
    assert [step for step, logs in logger.seen if "loss" in logs] == [2, 4, 6] * 2


def test_attach_returns_the_callback_and_adds_it_once(make_trainer):
    callback = SpectralCallback(every=100)
    trainer = make_trainer(first=[callback])
    assert callback.attach(trainer) is callback
    assert callback.attach(trainer) is callback
    assert sum(one is callback for one in trainer.callback_handler.callbacks) == 1
    with pytest.raises(ValueError, match="attached to another trainer. Make a new SpectralCallback for each"):
        callback.attach(make_trainer())
    with pytest.raises(TypeError, match="`trainer` must be a transformers Trainer; got str"):
        SpectralCallback().attach("trainer")


def test_tensorboard_files_have_the_metrics(make_trainer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = SpectralCallback(every=2)
    make_trainer([callback], report_to="tensorboard").train()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    found = EventAccumulator(str(events)).Reload()
    (tag,) = [tag for tag in found.Tags()["scalars"] if tag.endswith("spectral/cu")]
    values = {event.step: event.value for event in found.Scalars(tag)}
    assert values == pytest.approx(
        {one.step: one.total.capacity_utilization for one in callback.trajectory.snapshots}, rel=1e-6
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_kappa_covers_all_micro_batches(make_trainer):
    """Two accumulated micro-batches give the κ of one batch of both."""
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


@pytest.mark.slow
def test_without_gradients_there_is_no_kappa(make_trainer):
    callback = SpectralCallback(every=2, gradients=False)
    make_trainer([callback]).train()
    assert all(row.kappa is None for one in callback.trajectory.snapshots for row in one.modules)


@pytest.mark.slow
def test_resuming_continues_the_same_file(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = SpectralCallback(every=1)
    make_trainer([whole], **options).train()
    path = tmp_path / "run" / "spectra.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "mod')  # a line that was cut off
    assert steps(Trajectory.read(path)) == list(range(8))
    resumed = SpectralCallback(every=1)
    make_trainer([resumed], **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert steps(Trajectory.read(path)) == list(range(8))
    assert resumed.trajectory == Trajectory.read(path)
    for one, other in zip(whole.trajectory.snapshots, resumed.trajectory.snapshots, strict=True):
        assert one.qv_gap == pytest.approx(other.qv_gap, abs=1e-6)


def test_the_file_has_what_the_trainer_logs_and_the_config(make_trainer):
    callback = SpectralCallback(every=3)
    trainer = make_trainer([callback], eval_strategy="steps", eval_steps=4)
    trainer.train()
    found = Trajectory.read(trainer.args.output_dir)
    assert found == callback.trajectory
    logged = {one.step: one.values for one in found.logs}
    for log in trainer.state.log_history:
        if "loss" in log:
            assert logged[log["step"]]["loss"] == log["loss"]
            assert logged[log["step"]]["learning_rate"] == log["learning_rate"]
            assert "grad_norm" in logged[log["step"]]
    assert any("eval_loss" in values for values in logged.values())
    assert not any(key.startswith("spectral/") for values in logged.values() for key in values)
    assert found.config["adapter"]["peft_type"] == "LORA"
    assert found.config["trainer"]["learning_rate"] == trainer.args.learning_rate
    assert found.config["trainer"]["max_steps"] == trainer.state.max_steps


@pytest.mark.slow
def test_a_new_training_keeps_the_existing_file(make_trainer, tmp_path):
    for _ in range(2):
        make_trainer([SpectralCallback(every=4)]).train()
    assert steps(Trajectory.read(tmp_path / "run" / "spectra.jsonl")) == [0, 4, 7]
    assert steps(Trajectory.read(tmp_path / "run" / "spectra-1.jsonl")) == [0, 4, 7]


@pytest.mark.slow
def test_the_last_step_is_measured_when_training_stops_early(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    callback = SpectralCallback(every=3)
    make_trainer([callback, Stop()]).train()
    assert steps(callback.trajectory) == [0, 3, 5]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_last_measurement_is_the_last_step_not_the_best_checkpoint(make_trainer, strategy):
    """Trainer loads the best checkpoint, and loggers close, before `on_train_end`."""
    seen = {}

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = lens.snapshot(model).total.effective_rank

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_worse"] = -state.global_step  # the first is the best

        def on_train_end(self, args, state, control, **kwargs):
            seen["closed"] = [row for row in state.log_history if "spectral/cu" in row][-1]["step"]

    callback = SpectralCallback(every=100)
    trainer = make_trainer(
        [callback],
        first=[Follow(), EarlyStoppingCallback(1)],
        max_steps=50,
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="worse",
        greater_is_better=True,
    )
    trainer.train()
    last = callback.trajectory.snapshots[-1]
    end = trainer.state.global_step
    assert (last.step, trainer.state.best_global_step) == (end, end // 2)
    assert last.total.effective_rank == pytest.approx(seen[end], rel=1e-5)
    assert last.total.effective_rank != pytest.approx(lens.snapshot(trainer.model).total.effective_rank, rel=1e-3)
    assert seen["closed"] == end


@pytest.mark.slow
def test_an_interrupted_training_leaves_no_hooks_once_the_callback_is_gone(make_trainer):
    class Interrupted(Trainer):
        def training_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    def hooked(model):
        return any(hooks for module in model.modules() if (hooks := module._forward_hooks))

    trainer = make_trainer([SpectralCallback(every=1)])
    trainer.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model = trainer.model
    assert hooked(model)
    del trainer
    gc.collect()
    assert not hooked(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("logs", "`path` must be a file, new or existing; .*logs is not a file"),
        ("file/x.jsonl", "Not a directory|File exists"),
    ],
)
def test_a_file_that_cannot_be_written_stops_training_before_it_starts(make_trainer, tmp_path, path, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "logs").mkdir()
    trainer = make_trainer([SpectralCallback(path=tmp_path / path)])
    with pytest.raises((FileExistsError, NotADirectoryError), match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert (tmp_path / "logs").is_dir()


@pytest.mark.slow
def test_a_file_that_fails_later_does_not_stop_training(make_trainer, tmp_path):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                path = tmp_path / "run" / "spectra.jsonl"
                path.rename(tmp_path / "kept.jsonl")
                path.mkdir()

    callback = SpectralCallback(every=2)
    trainer = make_trainer([callback, Full()])
    with pytest.warns(UserWarning, match=r"stops writing to .*spectra.jsonl, and only logs: .*directory"):
        trainer.train()
    assert steps(Trajectory.read(tmp_path / "kept.jsonl")) == [0, 2]
    assert steps(callback.trajectory) == [0, 2, 4, 6, 7]
    assert [row["step"] for row in trainer.state.log_history if "spectral/cu" in row] == [0, 2, 4, 6, 7]


@pytest.mark.slow
def test_an_adapter_without_finite_modules_is_not_logged(make_trainer):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if state.global_step == 3 and "lora_B" in name:
                    parameter.data.fill_(torch.nan)

    logger, callback = Logger(), SpectralCallback(every=2)
    make_trainer([callback, Spoil()], first=[logger]).train()
    assert steps(callback.trajectory) == [0, 2, 4, 6, 7]
    assert all(row.effective_rank is None for row in callback.trajectory.snapshots[-1].modules)
    assert all("loss" in logs or "train_loss" in logs or "spectral/cu" in logs for _, logs in logger.seen)


@pytest.mark.slow
def test_a_compiled_model_has_no_kappa_and_warns(make_trainer):
    callback = SpectralCallback(every=2)
    trainer = make_trainer([callback], max_steps=2)
    trainer.model.get_base_model().model.layers[0].mlp.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"no gradient-subspace overlap \(kappa\)"):
        trainer.train()
    last = callback.trajectory.snapshots[-1]
    assert last.total.kappa is None
    assert last.total.capacity_utilization > 0


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.slow
def test_sft_trainer(tiny_llama, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    logged = []
    for number, watched in enumerate((False, True)):
        logger = Logger()
        trainer = SFTTrainer(
            tiny_llama(),
            args=SFTConfig(
                output_dir=str(tmp_path / str(number)), max_steps=4, logging_steps=2, report_to="none", use_cpu=True,
                disable_tqdm=True, bf16=False,
            ),
            train_dataset=Dataset.from_dict({"text": ["a b a b", "b b a"] * 8}),
            processing_class=tokenizer,
            peft_config=CONFIGS["FISHERLORA"](),
            callbacks=[logger],
        )  # fmt: skip
        callback = SpectralCallback(every=1)
        if watched:
            callback.attach(trainer)
        trainer.train()
        logged.append(logger.seen)
    assert steps(Trajectory.read(tmp_path / "1" / "spectra.jsonl")) == [0, 1, 2, 3, 4]
    assert callback.trajectory.snapshots[-1].role("query").kappa > 0
    assert [step for step, logs in logged[1] if "spectral/cu" in logs] == [0, 1, 2, 3, 4]
    plain, beside = ([(step, logs) for step, logs in seen if "mean_token_accuracy" in logs] for seen in logged)
    assert [step for step, _ in plain[:2]] == [2, 4]
    for (step, logs), (same_step, others) in zip(plain, beside, strict=True):  # TRL's averages are still of all steps
        assert step == same_step
        assert others["mean_token_accuracy"] == logs["mean_token_accuracy"]


@pytest.mark.slow
def test_dpo_trainer(tiny_llama, tokenizer, tmp_path):
    """Its reference passes run without the adapter, or with a copy of it, and do not count."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    callback = SpectralCallback(every=2)
    trainer = DPOTrainer(
        get_peft_model(tiny_llama(), CONFIGS["LORA"]()),
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 16, "chosen": [" a a"] * 16, "rejected": [" b"] * 16}),
        processing_class=tokenizer,
    )
    callback.attach(trainer)
    trainer.train()
    assert steps(Trajectory.read(tmp_path / "spectra.jsonl")) == [0, 2, 4]
    assert callback.trajectory.snapshots[-1].role("query").kappa > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be a positive integer; got 0"),
        ({"every": 2.5}, "`every` must be a positive integer; got 2.5"),
        ({"log": "all"}, "`log` must be one of summary, roles, modules; got 'all'"),
        ({"projections": 1}, "`projections` must be an integer of at least 2; got 1"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralCallback(**options)


@pytest.mark.slow
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
    first = trajectory.snapshots[0].modules[0].module_name
    assert trajectory.series(f"spectral/cu/{first}")[1] == [
        one.modules[0].capacity_utilization for one in trajectory.snapshots
    ]
    with pytest.raises(ValueError, match="`metric` must be one of spectral/cu, .*got 'cu'"):
        trajectory.series("cu")


@pytest.mark.slow
def test_the_plot_shows_utilization_gap_and_kappa(trajectory):
    left, middle, right = trajectory.plot().axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "10–90 % of modules", "query", "value", "down",
    ]  # fmt: skip
    query = left.lines[0]
    assert list(query.get_xdata()) == [0, 2, 4, 6, 7]
    assert list(query.get_ydata()) == pytest.approx(trajectory.series("spectral/cu_query")[1])
    assert list(middle.lines[1].get_ydata()) == [one.qv_gap for one in trajectory.snapshots]
    assert list(right.lines[0].get_ydata()) == trajectory.series("spectral/kappa_query")[1]
    assert list(right.lines[1].get_ydata()) == [one.role("query").kappa_chance for one in trajectory.snapshots[1:]]
    assert len({to_rgb(line.get_color()) for line in (left.lines[0], *right.lines[:2])}) == 1
    short = Trajectory(tuple(trajectory.snapshots[:2])).plot()
    assert all(tick.is_integer() for panel in short.axes for tick in panel.get_xticks())
    assert len(Trajectory(tuple(trajectory.snapshots[:1])).plot().axes) == 2  # κ was not there yet
    with pytest.raises(ValueError, match="no snapshot to plot"):
        Trajectory(()).plot()


def test_the_report(trajectory, tmp_path):
    again = Trajectory.read(tmp_path / "run" / "spectra.jsonl")
    assert again.headline == "5 snapshots, steps 0 to 7"
    assert [line.partition(":")[0] for line in again.details] == ["CU", "Q–V gap", "κ"]
    (step,) = again.next_steps
    assert eval(step.partition(".plot")[0], {"lorakit": lorakit}) == trajectory
    assert [row["step"] for row in again.rows()] == [0, 2, 4, 6, 7]
    assert again.to_frame()["spectral/cu_query"].iloc[-1] == again.series("spectral/cu_query")[1][-1]
    assert "run" in again.plot().get_suptitle()
    assert repr(again).splitlines()[0] == "Trajectory: 5 snapshots, steps 0 to 7"
    assert repr(Trajectory(())) == "Trajectory: no snapshots"


def test_trajectories_as_plain_data(trajectory):
    plain = json.loads(json.dumps(trajectory.to_dict(), allow_nan=False))
    assert [one["step"] for one in plain["snapshots"]] == [0, 2, 4, 6, 7]


def test_a_file_with_other_content(tmp_path, trajectory):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"loss": 1}\n' + json.dumps(trajectory.snapshots[0].to_dict()) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: .*not a snapshot"):
        Trajectory.read(path)
