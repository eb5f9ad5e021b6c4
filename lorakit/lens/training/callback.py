"""Spectra of an adapter while it trains: a callback for transformers' Trainer and the trainers built on it (TRL)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args

from transformers import Trainer, TrainerCallback

from lorakit._checks import check_integer
from lorakit._distributed.fsdp import is_sharded, unwrapped
from lorakit.adapters.in_model import find_adapter
from lorakit.lens._private import is_compiled
from lorakit.lens.training.basis import Basis, FixedBasis
from lorakit.lens.training.gradients import GradientProbes, GradientWatch
from lorakit.lens.training.snapshot import Detail, Snapshot, snapshot
from lorakit.lens.training.trajectory import (
    FILE_NAME,
    LoggedStep,
    Trajectory,
    append,
    append_config,
    append_log,
    begin,
    logged,
    together,
)


class SpectralCallback(TrainerCallback):  # type: ignore[misc]
    """Measures an adapter's spectra during training: ``SpectralCallback(every=10).attach(trainer)``.

    It measures at step 0, every `every` optimizer steps and after the last step. Each measurement covers every module:
    effective rank, stable rank, capacity utilization (CU), and the gradient-subspace overlap κ of the step just made.
    The whole measurement is appended to a JSONL file, with the run's config and all that the trainer logs (loss,
    learning rate, gradient norm, evaluations), which `lorakit.lens.Trajectory.read` reads. The metrics chosen by
    `log` also go to the trainer's loggers (TensorBoard, Weights & Biases, …) and to `state.log_history`.

    Passed as ``callbacks=[SpectralCallback()]`` it cannot reach the loggers: it writes the file and
    `state.log_history`, and says so once in a warning.

    Training is bit for bit the same as without the callback. Resuming from a checkpoint continues the same file.

    Args:
        every: optimizer steps between measurements.
        also: further steps at which to measure, such as ``range(10)``.
        path: the JSONL file; by default ``spectra.jsonl`` in the trainer's output directory. If the file exists when
            training starts at step 0, it is renamed, with a number added to its name.
        log: which metrics to log. "summary": `spectral/cu`, `spectral/qv_gap` and `spectral/kappa`. "roles": these,
            effective and stable rank, each also by role (`spectral/cu_query`). "modules": also by module.
        gradients: whether to watch gradients, which κ needs.
        projections: random projections for ‖G‖; see `lorakit.lens.watch_gradients`.
        basis: fixed subspaces for κ, in the place of those that ΔW has at the step: a report of `gradient_subspaces` or
            `update_spectra` of `lorakit.experiments.pilot`, or U (d_out, q) and V (d_in, q) with orthonormal columns by
            module name, for all linear modules of the adapter.
        adapter_name: which adapter to measure. Needed unless exactly one is active.
        seed: seed of the projections.

    With several processes only the first one logs and writes. Under `fully_shard` (FSDP2) all of them take part in the
    measurement. Models wrapped in FullyShardedDataParallel (FSDP1) are refused when training begins. Modules that
    torch.compile has compiled have no κ; a warning says so.

    Raises: ValueError for an `every`, `projections` or `log` that is not allowed; TypeError and ValueError for a
    `basis` that is not orthonormal, or given with ``gradients=False``. When training begins: whatever
    `lorakit.lens.snapshot` raises, ValueError for a `basis` that does not fit the adapter, and OSError if the file
    cannot be written. If writing fails later, training goes on without the file, with a warning.
    """

    def __init__(
        self,
        every: int = 10,
        *,
        also: Collection[int] = (),
        path: str | os.PathLike[str] | None = None,
        log: Detail = "summary",
        gradients: bool = True,
        projections: int = 8,
        basis: Basis | None = None,
        adapter_name: str | None = None,
        seed: int = 0,
    ) -> None:
        if log not in get_args(Detail):
            raise ValueError(f"`log` must be one of {', '.join(get_args(Detail))}; got {log!r}.")
        self.every, self.also = check_integer("every", every), frozenset(also)
        self.path = None if path is None else Path(path)
        self.log = log
        self.gradients, self.seed = gradients, seed
        self.projections = check_integer("projections", projections, least=2)
        if basis is not None and not gradients:
            raise ValueError("`basis` is for κ, which needs `gradients=True`; got gradients=False.")
        self.basis = None if basis is None else FixedBasis(basis)
        self.adapter_name = adapter_name
        self._trainer: Any = None
        self._told = False  # how to reach the loggers
        self._snapshots: list[Snapshot] = []
        self._logs: list[LoggedStep] = []
        self._config: Mapping[str, Any] = {}
        self._probes: GradientProbes | None = None
        self._watch: GradientWatch | None = None
        self._last: int | None = None  # the step measured last
        self._file: Path | None = None

    def attach(self, trainer: Any) -> SpectralCallback:
        """Add the callback to a trainer and log through it. Returns the callback.

        The metrics go through `transformers.Trainer.log`. A subclass's own `log` is not called: TRL's would add its
        averages of the steps so far, and start new ones.
        Raises: TypeError if `trainer` is not a transformers Trainer; ValueError if the callback is attached to another.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainer` must be a transformers Trainer; got {type(trainer).__name__}.")
        if self._trainer is not None and self._trainer is not trainer:
            raise ValueError(
                "This SpectralCallback is attached to another trainer. Make a new SpectralCallback for each trainer."
            )
        self._trainer = trainer
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        return self

    @property
    def trajectory(self) -> Trajectory:
        """The measurements that this process made in the current or last training."""
        path = None if self._file is None else os.fspath(self._file)
        return Trajectory(tuple(self._snapshots), path, together(self._logs), self._config)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the model, open the file, and measure at step 0."""
        self._stop_watching()
        model = unwrapped(kwargs["model"])
        _, modules = find_adapter(model, self.adapter_name)
        if self.basis is not None:
            self.basis.check(model, modules)
        self._sharded = any(is_sharded(parameter) for module in modules for parameter in module.layer.parameters())
        compiled = is_compiled(model) or getattr(args, "torch_compile", False)
        self._watches = self.gradients and not compiled
        if self.gradients and compiled:
            warnings.warn(
                "SpectralCallback cannot watch the gradients of a model that is compiled by torch.compile: there will "
                "be no gradient-subspace overlap (kappa).",
                stacklevel=2,
            )
        if self._trainer is None and not self._told and state.is_world_process_zero:
            self._told = True
            warnings.warn(
                "SpectralCallback was passed in `callbacks`, so that it writes its file and `state.log_history` only. "
                "To log to TensorBoard, Weights & Biases and the like as well, leave it out of `callbacks` and call "
                "SpectralCallback(...).attach(trainer) before trainer.train().",
                stacklevel=2,
            )
        self._file = self.path or Path(args.output_dir) / FILE_NAME
        self._last = state.global_step
        kept = begin(self._file, state.global_step) if state.is_world_process_zero else Trajectory(())
        self._snapshots, self._logs, self._config = list(kept.snapshots), list(kept.logs), kept.config
        if state.is_world_process_zero and state.global_step == 0:
            self._config = _config_of(model, self.adapter_name, args, state)
            self._write(append_config, self._config)
        if state.global_step == 0:
            self._measure(args, state, control, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start watching gradients if the coming step is measured."""
        self._stop_watching()  # of a step that did not end
        if self._watches and self._due(state.global_step + 1, state.max_steps):
            self._probes = GradientProbes(
                kwargs["model"],
                projections=self.projections,
                seed=self.seed + state.global_step,
                adapter_name=self.adapter_name,
                basis=self.basis,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching gradients, before the factors change."""
        if self._probes is not None:
            probes = self._probes
            self._stop_watching()
            self._watch = GradientWatch(probes.overlaps(), None if self.basis is None else self.basis.description)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if this step is due."""
        if self._due(state.global_step, state.max_steps):
            self._measure(args, state, control, kwargs["model"])
        self._watch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what the trainer logs, and measure the last step at its last log.

        Later it loads the best checkpoint, and loggers close.
        """
        log = logged(state.global_step, logs) if logs and state.is_world_process_zero else None
        if log is not None:
            self._logs.append(log)
            self._write(append_log, log)
        if logs and "train_runtime" in logs and self._last != state.global_step:
            self._measure(args, state, control, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the last step in trainers that make no such last log."""
        self._stop_watching()
        if self._last != state.global_step:
            self._measure(args, state, control, kwargs["model"])

    def _due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step in self.also or step == last

    def _stop_watching(self) -> None:
        if self._probes is not None:
            self._probes.remove()
        self._probes = self._watch = None

    def _measure(self, args: Any, state: Any, control: Any, model: Any) -> None:
        self._last = state.global_step
        if not (state.is_world_process_zero or self._sharded):
            return
        seen = snapshot(model, step=state.global_step, gradients=self._watch, adapter_name=self.adapter_name)
        self._snapshots.append(seen)
        if not state.is_world_process_zero:
            return
        self._write(append, seen)
        metrics = seen.metrics(self.log)
        if metrics:  # none if no module is finite
            self._log(metrics, state, control)

    def _write(self, write: Callable[..., None], *what: Any) -> None:
        if self._file is None:
            return
        try:
            write(self._file, *what)
        except OSError as error:  # such as a full disk, which must not end the training
            warnings.warn(f"SpectralCallback stops writing to {self._file}, and only logs: {error}", stacklevel=3)
            self._file = None  # a line that was cut off stays the last one

    def _log(self, metrics: dict[str, float], state: Any, control: Any) -> None:
        if self._trainer is None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**metrics, **epoch, "step": state.global_step})
            return
        should_log = control.should_log
        Trainer.log(self._trainer, metrics)
        control.should_log = should_log  # which a log resets, although the trainer's own is still to come


_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "warmup_steps",
    "optim",
    "bf16",
    "fp16",
    "seed",
)


def _config_of(model: Any, adapter_name: str | None, args: Any, state: Any) -> dict[str, Any]:
    """The adapter's config, and those of the trainer's arguments that say how it was trained."""
    name, modules = find_adapter(model, adapter_name)
    config = getattr(model, "peft_config", {}).get(name)
    adapter = {} if config is None else config.to_dict()
    trainer = {key: getattr(args, key) for key in _ARGUMENTS if hasattr(args, key)}
    found = {"adapter": adapter, "trainer": trainer | {"max_steps": state.max_steps}, "modules": len(modules)}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_text))
    return plain


def _text(value: Any) -> Any:
    """What JSON does not have, as JSON data: sets in order, and the rest as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
