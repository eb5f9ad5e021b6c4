"""The shell: its exit codes, and that stdout is for results."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorakit


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorakit", *arguments], capture_output=True, text=True, timeout=120
    )


def test_version_and_help():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"lorakit {lorakit.__version__}\n")
    done = run("demo", "--help")
    assert done.returncode == 0
    assert "--model" in done.stdout


@pytest.mark.parametrize("arguments", [("demo", "--steps", "0"), ("demo", "--nothing"), ("nothing",)])
def test_wrong_usage_is_exit_code_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""


def test_bad_input_is_exit_code_1_with_a_message_and_no_traceback(tmp_path):
    done = run("demo", "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "lorakit: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_starts_without_torch(run_python):
    code = """
        import sys
        import lorakit.cli
        print(sorted({"torch", "peft", "transformers"} & set(sys.modules)))
    """
    assert run_python(code).stdout.strip() == "[]"
