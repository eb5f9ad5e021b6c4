"""What a command does in a shell besides its work: exit codes, messages, and what goes to stdout."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, ParamSpec, TextIO

import typer

from lorakit._format import visible
from lorakit.cli._output import STDOUT
from lorakit.errors import LorakitError

P = ParamSpec("P")

BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # the last two are 128 + the signal, as shells have it


def in_a_shell(command: Callable[P, None]) -> Callable[P, NoReturn]:
    """The command, ending in an exit code: its own, 2 for bad input, 130 for Ctrl-C, 141 for a closed pipe.

    With `--json` stdout gets the JSON alone; whatever else is printed goes to stderr. Messages have control characters
    and newlines as escapes.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        out = sys.stdout
        token = STDOUT.set(out)
        try:
            with _readable_messages(), contextlib.redirect_stdout(sys.stderr if kwargs.get("as_json") else out):
                raise typer.Exit(_code_of(functools.partial(command, *args, **kwargs), out))
        finally:
            STDOUT.reset(token)

    return run


def _code_of(command: Callable[[], None], out: TextIO) -> int:
    try:
        code = 0
        try:
            command()
        except typer.Exit as end:
            code = end.exit_code
        out.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # so ends rich's console, with a code that means a finding
            return CLOSED_PIPE
        raise
    except BrokenPipeError as error:
        if error.filename is None:  # the reader of stdout has gone, as `head` does when it has read enough
            _discard(out)
            return CLOSED_PIPE
        complain(str(error))
        return BAD_INPUT
    except (LorakitError, ValueError, OSError) as error:
        complain(str(error))
        with contextlib.suppress(OSError):
            out.flush()
            return BAD_INPUT
        _discard(out)  # it is full, or closed: Python would say so again when it ends
        return BAD_INPUT


def complain(message: str) -> None:
    """Print an error on stderr, in one line."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    console.print(f"lorakit: {visible(message)}", style="red", markup=False, highlight=False)


@contextlib.contextmanager
def _readable_messages() -> Iterator[None]:
    """Print warnings in one line each, and what is logged without control characters."""
    make_record = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make_record(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # wrong arguments for the format: logging says so itself
            made.msg, made.args = "\n".join(map(visible, made.getMessage().split("\n"))), None
        return made

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        sys.stderr.write(f"lorakit: {category.__name__}: {visible(str(message))}\n")

    shown = warnings.showwarning
    logging.setLogRecordFactory(record)
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
        logging.setLogRecordFactory(make_record)


def _discard(out: TextIO) -> None:
    """Have what is still in the buffer go nowhere when Python flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):  # `out` is no file of the system's
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, out.fileno())
        os.close(null)
