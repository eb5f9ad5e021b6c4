"""Context managers that Ctrl-C, or another signal, cannot interrupt while they are entered or left.

Python runs signal handlers between any two instructions of the main thread, so a KeyboardInterrupt may be raised in a
`finally` block, or just before it, and leave a model half restored. A signal that arrives while one of these managers
is entered or left is delivered after that. In the block, signals act as they always do.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Those whose handlers may raise an exception: Ctrl-C, schedulers, time limits.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_GUARDED: set[CodeType] = set()  # functions that are not interrupted


class _Deferral:
    """Handles signals: passes them on, but keeps those that arrive while a function of `_GUARDED` runs.

    Python calls handlers in the main thread alone, and only there they can be set. Elsewhere there is nothing to do.
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._kept: list[int] = []
        self.entered = False
        self._handler = self._handle  # one object, so that it can be recognised

    def install(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if not callable(handler):  # the system's default, ignored, or not set from Python
                continue
            self._before[number] = handler
            try:
                signal.signal(number, self._handler)
            except ValueError:  # not the main thread
                return

    def remove(self) -> None:
        """Give every signal its former handler again; one that arrives when it has it ends this only at the end."""
        raised: BaseException | None = None
        left = list(self._before.items())
        while left:
            try:
                while left:
                    number, handler = left[-1]
                    if signal.getsignal(number) is self._handler:  # else the block has set another, or there was none
                        signal.signal(number, handler)
                    left.pop()
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised

    def deliver(self, frame: FrameType | None) -> None:
        """Call the former handlers for the signals that were kept, as if they had arrived in `frame`."""
        if self._kept:
            number = self._kept.pop(0)
            try:
                self._before[number](number, frame)
            finally:
                self.deliver(frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        guarded = _GUARDED - {_Uninterrupted.__enter__.__code__} if self.entered else _GUARDED
        caller = frame
        while caller is not None and caller.f_code not in guarded:
            caller = caller.f_back
        if caller is None:
            self._before[number](number, frame)
        else:
            self._kept.append(number)


class _Uninterrupted(contextlib.ContextDecorator, Generic[T]):
    """A context manager that is entered and left without interruption."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[T]]) -> None:
        self._make = make

    def _recreate_cm(self) -> _Uninterrupted[T]:  # contextlib's name: a decorated function needs one for each call
        return _Uninterrupted(self._make)

    def __enter__(self) -> T:
        self._deferral = _Deferral()
        try:
            self._deferral.install()
            self._inner = self._make()
            value = self._inner.__enter__()
            try:
                self._deferral.entered = True
                self._deferral.deliver(sys._getframe(1))
                return value
            except BaseException:
                self._deferral.entered = False
                self._inner.__exit__(*sys.exc_info())
                raise
        except BaseException:
            self._deferral.entered = False
            self._deferral.remove()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            try:
                self._deferral.remove()
            finally:
                self._deferral.deliver(sys._getframe(1))


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with signals that arrive while it runs delivered when it has ended."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return _run(functools.partial(function, *args, **kwargs))

    return run


def _run(function: Callable[[], T]) -> T:
    deferral = _Deferral()
    try:
        deferral.install()
        return function()
    finally:
        try:
            deferral.remove()
        finally:
            deferral.deliver(sys._getframe(1))


_GUARDED |= {_Uninterrupted.__enter__.__code__, _Uninterrupted.__exit__.__code__, _run.__code__}


def restoring(function: Callable[P, Iterator[T]]) -> Callable[P, _Uninterrupted[T]]:
    """As `contextlib.contextmanager`, but no signal interrupts what is before and after the `yield`."""
    manager = contextlib.contextmanager(function)

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> _Uninterrupted[T]:
        return _Uninterrupted(lambda: manager(*args, **kwargs))

    return made


@restoring
def all_of(managers: Iterable[contextlib.AbstractContextManager[T]]) -> Iterator[list[T]]:
    """Enter context managers one after the other, and leave them in reverse."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(manager) for manager in managers]
