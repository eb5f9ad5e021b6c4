"""Spectra while training: a callback for transformers' Trainer, and for what is built on it, such as TRL's."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from lorakit._distributed.fsdp import is_sharded, unwrapped
from lorakit.adapters.in_model import find_adapter
from lorakit.lens.training.gradients import GradientTaps, GradientWatch, is_compiled
from lorakit.lens.training.snapshot import Snapshot, snapshot
from lorakit.lens.training.trajectory import Trajectory, append, begin


class SpectralCallback(TrainerCallback):  # type: ignore[misc]
    """Logs what training does to an adapter's spectra: pass it to a Trainer as ``callbacks=[SpectralCallback()]``.

    At step 0, every `every` optimizer steps and at the end: capacity utilization, effective and stable rank of every
    module and their means by role, the Q-V gap, and the gradient-subspace overlap κ of the step just made. The means
    go to the Trainer's log, as ``spectral/cu_query`` and the like, and so to whatever it reports to (TensorBoard,
    Weights & Biases, …); all of it goes to a JSONL file that `lorakit.lens.Trajectory.read` reads. Training is as
    without it: no random number is drawn from torch's own generators, nothing of the model changes. A training that is
    resumed from a checkpoint goes on in the same file.

    Args:
        every: in optimizer steps.
        also: further steps at which to look, such as ``range(10)``.
        path: the JSONL file; ``spectra.jsonl`` in the Trainer's output directory unless given. One that is there when
            a training begins at step 0 is kept, under a name with a number.
        gradients: whether to watch gradients for κ, at the steps where it looks.
        projections: random projections for ‖G‖, see `lorakit.lens.watch_gradients`.
        log_modules: also log every module's numbers, not only the means.
        adapter_name: needed where not exactly one adapter is active.
        seed: of the projections.

    Of several processes only the first logs and writes. Under fully_shard (FSDP2) all take part in measuring; models
    wrapped by FullyShardedDataParallel (FSDP1) are refused when training begins. κ is not there for models that
    torch.compile compiled, with a warning.
    Raises: ValueError for `every` or `projections` that are no such numbers; when training begins, what
    `lorakit.lens.snapshot` raises, and OSError where the file cannot be written. Where that fails later training
    goes on, with a warning and without the file.
    """

    def __init__(
        self,
        every: int = 10,
        *,
        also: Collection[int] = (),
        path: str | os.PathLike[str] | None = None,
        gradients: bool = True,
        projections: int = 8,
        log_modules: bool = False,
        adapter_name: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("every", every, 1), ("projections", projections, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")
        self.every, self.also = every, frozenset(also)
        self.path = None if path is None else Path(path)
        self.gradients, self.projections, self.seed = gradients, projections, seed
        self.log_modules, self.adapter_name = log_modules, adapter_name
        self._snapshots: list[Snapshot] = []
        self._taps: GradientTaps | None = None
        self._watch: GradientWatch | None = None
        self._last: int | None = None  # the step looked at last
        self._file: Path | None = None

    @property
    def trajectory(self) -> Trajectory:
        """What was seen in this process, in the training that runs or ran last."""
        return Trajectory(tuple(self._snapshots))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_watching()
        model = unwrapped(kwargs["model"])
        _, modules = find_adapter(model, self.adapter_name)
        self._together = any(is_sharded(parameter) for module in modules for parameter in module.layer.parameters())
        compiled = is_compiled(model) or getattr(args, "torch_compile", False)
        self._watches = self.gradients and not compiled
        if self.gradients and compiled:
            warnings.warn(
                "SpectralCallback cannot watch the gradients of a model that torch.compile compiles: there will be no "
                "gradient-subspace overlap (kappa).",
                stacklevel=2,
            )
        self._file = self.path or Path(args.output_dir) / "spectra.jsonl"
        self._last = state.global_step
        self._snapshots = begin(self._file, state.global_step) if state.is_world_process_zero else []
        if state.global_step == 0:
            self._look(args, state, control, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_watching()  # a step that was not ended
        if self._watches and self._due(state.global_step + 1, state.max_steps):
            self._taps = GradientTaps(
                kwargs["model"],
                projections=self.projections,
                seed=self.seed + state.global_step,
                adapter_name=self.adapter_name,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._taps is not None:
            taps = self._taps
            self._stop_watching()
            self._watch = GradientWatch(taps.overlaps())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due(state.global_step, state.max_steps):
            self._look(args, state, control, kwargs["model"])
        self._watch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's last log is the end: later it loads the best checkpoint, and loggers close."""
        if logs and "train_runtime" in logs and self._last != state.global_step:
            self._look(args, state, control, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_watching()
        if self._last != state.global_step:  # a loop without such a log
            self._look(args, state, control, kwargs["model"])

    def _due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step in self.also or step == last

    def _stop_watching(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps = self._watch = None

    def _look(self, args: Any, state: Any, control: Any, model: Any) -> None:
        self._last = state.global_step
        if not (state.is_world_process_zero or self._together):
            return
        seen = snapshot(model, step=state.global_step, gradients=self._watch, adapter_name=self.adapter_name)
        self._snapshots.append(seen)
        if not state.is_world_process_zero:
            return
        if self._file is not None:
            try:
                append(self._file, seen)
            except OSError as error:  # a full disk, say, which is not to cost the training
                warnings.warn(f"SpectralCallback stops writing to {self._file}, and only logs: {error}", stacklevel=2)
                self._file = None  # what was cut off stays its last line
        logs: dict[str, Any] = seen.metrics(modules=self.log_modules)
        if not logs:  # nothing is finite
            return
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        _log(logs, args, state, control)


def _log(logs: dict[str, Any], args: Any, state: Any, control: Any) -> None:
    """What Trainer.log does. It gives callbacks no way to itself, nor to the loggers, which it has called before those
    that users add; so they are called through the handler that is calling this callback. A subclass's own `log` is not
    called: TRL's would add its averages of the steps so far, and begin new ones."""
    state.log_history.append({**logs, "step": state.global_step})
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            should_log = control.should_log
            handler.call_event("on_log", args, state, control, logs=logs)
            control.should_log = should_log
            return
        frame = frame.f_back
