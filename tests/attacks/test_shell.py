"""Commands in a shell of their own: closed pipes, full disks, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "lorakit"]


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(write):
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "audit", write()], stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_a_full_disk_is_one_message(write):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "audit", write()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


@pytest.fixture
def interruptible():
    """Children do not ignore Ctrl-C, as those of a job in the background do."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("delay", [0.3, 1.0, 3.0])
def test_ctrl_c_is_quiet_and_130(write, tmp_path, delay):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # without a reader, so that the command waits
    process = subprocess.Popen([*COMMAND, "audit", write(), "--html", fifo], stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    # Before lorakit's first line Python itself ends, with its own words. Shells show -SIGINT as 130.
    assert process.returncode in (130, -signal.SIGINT) or "lorakit/cli" not in err


def test_an_interrupt_waits_for_the_end_of_an_import(tmp_path):
    (tmp_path / "swallows.py").write_text("""
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
except BaseException:
    pass
""")
    script = """
import signal, sys, time
from lorakit.cli import _interrupt
signal.signal(signal.SIGINT, _interrupt)
import swallows
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"})
    assert done.returncode == 130


@pytest.mark.slow
def test_json_and_html_share_stdout_with_nothing_else(write):
    done = subprocess.run(
        [*COMMAND, "audit", write(), "--json", "--html", "/dev/stderr"], capture_output=True, text=True
    )
    assert "summary" in json.loads(done.stdout)
    assert done.stderr.startswith("<!doctype html>")
