"""What type checkers say of a user's script: nothing about names that exist, an error for each that does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "typing" / "user_script.py"
WRONG = [number for number, line in enumerate(SCRIPT.read_text().splitlines(), 1) if line.endswith("# error")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["mypy", "--no-incremental", "--follow-imports=silent", "--ignore-missing-imports", "--config-file="],
        ["basedpyright", "--level", "error", "--pythonpath", sys.executable],
    ],
    ids=lambda command: command[0],
)
def test_a_name_that_does_not_exist_is_an_error(command, tmp_path):
    script = tmp_path / "user_script.py"
    script.write_text(SCRIPT.read_text())
    (tmp_path / "pyproject.toml").write_text("[tool.basedpyright]\ntypeCheckingMode = 'basic'\n")
    done = subprocess.run(
        [sys.executable, "-m", *command, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    found = {int(number) for number in re.findall(r"user_script\.py:(\d+)", done.stdout)}
    assert found == set(WRONG), done.stdout + done.stderr
