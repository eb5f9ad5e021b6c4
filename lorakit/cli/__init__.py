"""The command line."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

_AGAIN_S = 0.05


def main() -> None:
    """Run the command. Ctrl-C ends it quietly, also while it is still importing."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: a background job
            signal.signal(signal.SIGINT, _interrupt)
        from lorakit.cli.app import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but never within an import: modules that catch all errors of an import would lose it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt
