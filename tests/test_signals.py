"""A signal wherever Python looks for one while a context manager is entered or left: all is restored, none is lost."""

from __future__ import annotations

import contextlib
import dis
import gc
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorakit
from lorakit import fisher, surgery
from lorakit._files import write_file
from lorakit._signals import all_of, restoring, uninterrupted
from lorakit.adapters.atomic import replaced_directory
from lorakit.calibration.state import (
    activated,
    in_eval_mode,
    no_inference_mode,
    preserved_rng,
    preserved_state,
)
from lorakit.evaluation._attach import without_adapters
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._private import preserved_switches

OWN = str(Path(lorakit.__file__).parent)
FILES = (OWN, contextlib.__file__)
# After these instructions Python runs the handlers of signals: at a function's start, after a call, in a loop.
LOOKED_AFTER = {"RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}


class Interrupts:
    """Sends a signal at the `place`-th point in lorakit or contextlib at which Python looks for signals."""

    def __init__(self, place: int | None = None, number: int = signal.SIGINT) -> None:
        self.place, self.number, self.seen = place, number, 0
        self.last = {}  # the instruction that each frame has executed

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if self.last.get(frame) in LOOKED_AFTER:
                if self.seen == self.place:
                    signal.raise_signal(self.number)
                self.seen += 1
            self.last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        return self._trace

    def run(self, action):
        """Whether the action was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            self.last.clear()
        return False


def at_every_place(action, check, number=signal.SIGINT):
    counted = Interrupts()
    gc.collect()
    gc.disable()  # a collection runs code that is not the action's
    try:
        assert not counted.run(action)
        check()
        assert counted.seen > 10
        before = handlers()
        for place in range(counted.seen):
            assert Interrupts(place, number).run(action), f"place {place}: the interrupt was lost"
            check()
            assert handlers() == before, f"place {place}: a handler was not restored"
    finally:
        gc.enable()


def handlers():
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


@pytest.fixture(autouse=True)
def handlers_stay():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    before = handlers()
    yield
    after = handlers()
    signal.signal(signal.SIGINT, inherited)
    assert after == before


class Log(list):
    @restoring
    def manager(self, name):
        self.append(f"+{name}")
        try:
            yield name
        finally:
            self.append(f"-{name}")

    def check(self):
        opened = [one for one in self if one.startswith("+")]
        closed = [f"+{one[1:]}" for one in self if one.startswith("-")]
        assert sorted(opened) == sorted(closed)
        self.clear()


def test_what_is_entered_is_left_whatever_is_interrupted():
    log = Log()

    def action():
        with log.manager("a"), all_of(map(log.manager, "bcd")) as names:
            assert names == ["b", "c", "d"]

    at_every_place(action, log.check)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM, signal.SIGUSR1])
def test_every_handler_is_restored_whichever_signal_arrives(number):
    """One signal that has its own handler again may raise before the other handlers are restored."""
    log = Log()

    def action():
        with log.manager("a"):
            uninterrupted(lambda: None)()

    before = {one: signal.signal(one, signal.default_int_handler) for one in (signal.SIGALRM, signal.SIGUSR1)}
    try:
        at_every_place(action, log.check, number)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_a_manager_inside_another_one():
    log = Log()

    @restoring
    def outer():
        with log.manager("inner") as inner:
            yield inner

    def action():
        with outer():
            pass

    at_every_place(action, log.check)


def test_as_a_decorator():
    log = Log()

    @log.manager("a")
    def action():
        pass

    @log.manager("b")
    def twice():
        action()
        action()

    twice()
    assert log == ["+b", "+a", "-a", "+a", "-a", "-b"]


def test_a_function_that_is_not_interrupted():
    done = []

    @uninterrupted
    def both():
        done.append(1)
        signal.raise_signal(signal.SIGINT)
        done.append(2)

    with pytest.raises(KeyboardInterrupt):
        both()
    assert done == [1, 2]


def test_signals_act_at_once_in_the_block_and_a_handler_that_does_not_raise_is_called_once():
    log, seen = Log(), []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with log.manager("a"):
            signal.raise_signal(signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]

        @restoring
        def raising():
            signal.raise_signal(signal.SIGUSR1)
            yield len(seen)
            signal.raise_signal(signal.SIGUSR1)

        with raising() as inside:
            assert (inside, len(seen)) == (1, 2)
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_signal_is_not_lost_because_the_first_raises():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))

    @uninterrupted
    def both():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR1)

    try:
        with pytest.raises(KeyboardInterrupt):
            both()
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_the_block_sets_stays():
    log = Log()
    before = signal.getsignal(signal.SIGINT)

    def own(number, frame):
        pass

    try:
        with log.manager("a"):
            signal.signal(signal.SIGINT, own)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_nothing_is_deferred_and_everything_restored():
    log, handler = Log(), signal.getsignal(signal.SIGINT)

    def work():
        with log.manager("a"), contextlib.suppress(ValueError), log.manager("b"):
            raise ValueError

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert log == ["+a", "+b", "-b", "-a"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_errors_of_the_block_and_of_the_manager_pass_through():
    log = Log()
    with pytest.raises(ValueError, match="mine"), log.manager("a"):
        raise ValueError("mine")

    @restoring
    def broken():
        raise ValueError("at first")
        yield

    with pytest.raises(ValueError, match="at first"), broken():
        pass
    log.check()


# --- the managers that restore a model


def layers():
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
            self.config = type("Config", (), {"use_cache": True})()

        def forward(self, x):
            return self.q_proj(x).tanh() * self.v_proj(x)

    return Model()


def adapter():
    model = get_peft_model(layers(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def fingerprint(model):
    """Everything that a pass may leave changed."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.data_ptr(), p.sum().item(), p.grad is None) for name, p in model.named_parameters()],
        [getattr(m, "_active_adapter", None) for m in model.modules()],
        [getattr(m, "_disable_adapters", None) for m in model.modules()],
        [len(m._forward_pre_hooks) for m in model.modules()],
        model.config.use_cache if hasattr(model, "config") and not isinstance(model.config, dict) else None,
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        random.getstate()[1][:3],
        np.random.get_state()[1][:3].tolist(),
        torch.random.get_rng_state()[:64].tolist(),
    )


def disturb(model):
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    random.random(), np.random.rand(), torch.rand(1)


MANAGERS = {
    "preserved_state": (layers, lambda model: preserved_state(model)),
    "adapter_state": (adapter, lambda model: preserved_state(model)),
    "activated": (adapter, lambda model: activated(model, "other")),
    "without_adapters": (adapter, lambda model: without_adapters(model.get_base_model())),
    "switches": (adapter, lambda model: preserved_switches([m for m in model.modules() if hasattr(m, "lora_A")])),
    "preserved_base": (layers, lambda model: preserved_base(model, LoraConfig(bias="all"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANAGERS)
def test_a_model_is_restored_wherever_ctrl_c_arrives(name):
    make, manager = MANAGERS[name]
    torch.manual_seed(0)
    model = make()
    before = fingerprint(model)

    def action():
        with preserved_state(model), preserved_rng(model), no_inference_mode(), in_eval_mode(model), manager(model):
            disturb(model)

    def check():
        assert fingerprint(model) == before

    at_every_place(action, check)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in callbacks of other libraries
@pytest.mark.parametrize("kind", ["fisher", "surgery"])
def test_whole_passes_interrupted_by_a_timer(kind):
    """Real signals, at times that nobody chose, from the first instruction to the last."""
    torch.manual_seed(0)
    model = adapter() if kind == "surgery" else layers()
    batches = [torch.randn(2, 3, 4) for _ in range(2)]
    before = fingerprint(model)

    def loss_fn(model, batch):
        return model(batch).square().mean((1, 2))

    def action():
        options = {"loss_fn": loss_fn, "progress": False, "num_examples": 4}
        if kind == "surgery":
            surgery.sensitivity(model, batches, adapter_name="default", target_modules="all-linear", **options)
        else:
            fisher.probe(model, batches, **options)

    action()
    started = time.perf_counter()
    action()
    took = time.perf_counter() - started
    interrupted = 0
    gc.disable()  # other libraries' callbacks at a collection report an interrupt in their own way
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, took * (i + 0.5) / 60))
                action()
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert fingerprint(model) == before
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert interrupted > 10


@pytest.mark.slow
def test_no_temporary_file_is_left_wherever_ctrl_c_arrives(tmp_path):
    target = tmp_path / "report.html"

    def check():
        assert [path.name for path in tmp_path.iterdir()] in (["report.html"], [])
        assert not target.exists() or target.read_text() == "new"

    at_every_place(lambda: write_file(target, "new"), check)


@pytest.mark.slow
def test_no_temporary_directory_is_left_and_an_adapter_is_whole_wherever_ctrl_c_arrives(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    for name in ("a", "b"):
        (out / name).write_text("old")

    def action():
        with replaced_directory(out) as staging:
            (staging / "a").write_text("new")
            (staging / "b").write_text("new")

    def check():
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.read_text() for path in out.iterdir()} in (
            {"a": "old", "b": "old", "mine": "kept"},
            {"a": "new", "b": "new", "mine": "kept"},
        )
        for name in ("a", "b"):
            (out / name).write_text("old")

    at_every_place(action, check)
