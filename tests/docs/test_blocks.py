"""Every Python and shell block in the README and in docs/ runs, from top to bottom of its page, on a tiny model."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = "docs/examples.md"

# Lines that do not run here, by page and line (comments left out), each with its reason.
EXEMPT: dict[tuple[str, str], str] = {
    ("README.md", "make demo"): "make: installs an environment and trains for minutes",
    ("README.md", ". .venv/bin/activate"): "the environment that make installs",
    ("README.md", "make test"): "make: this test suite",
    ("README.md", "pip install ."): "an installer",
    ("docs/lora-lens-study.md", "python benchmarks/lora_lens_study.py runs/"): "20 trainings, some 70 minutes",
    ("docs/lora-lens-study.md", "python benchmarks/lora_lens_report.py runs/"): "needs the output of the 20 trainings",
    (
        "docs/how-to/shell-completion.md",
        "lorakit --install-completion",
    ): "changes the start-up files of the user's shell",
}


def _shell_lines(text: str) -> list[tuple[str, int]]:
    """The commands of a shell block without their comments, each with the exit code that its comment states."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition(" #") if not line.startswith("#") else ("", "", "")
        stated = re.search(r"exit code (\d+)", comment)
        if command.strip():
            found.append((" ".join(command.split()), int(stated[1]) if stated else 0))
    return found


def _run_shell(example: Example) -> None:
    page = str(Path(example.path).relative_to(ROOT))
    for command, code in _shell_lines(example.parsed):
        if (page, command) not in EXEMPT:
            actual, output = _run_line(command)
            assert actual == code, f"{page}:{example.line}: {command}\nexit code {actual}, not {code}\n{output}"


def _run_line(command: str) -> tuple[int, str]:
    words = shlex.split(command)
    if words[0] == "lorakit" and not set(words) & {"|", ">", "&&", ";"}:
        return _run_lorakit(words[1:])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout + done.stderr


def _run_lorakit(arguments: list[str]) -> tuple[int, str]:
    """The command in this process, which saves starting Python and torch each time."""
    from lorakit.cli.app import main

    output, before = io.StringIO(), sys.argv
    sys.argv = ["lorakit", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main()
    except SystemExit as stop:
        return int(stop.code or 0), output.getvalue()
    finally:
        sys.argv = before
    return 0, output.getvalue()


def _write_file(example: Example) -> None:
    """A file whose name the first line of the block says, in a comment."""
    name, _, _ = example.parsed.partition("\n")
    Path(name.removeprefix("# ")).write_text(example.parsed)


BLOCKS = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="sh", evaluator=_run_shell),
        CodeBlockParser(language="yaml", evaluator=_write_file),
    ]
)


def _uses_examples(text: str) -> bool:
    """Whether a page says that its names are those of the page of examples."""
    return re.search(r"In these examples,[^.]*\]\((\.\./)?examples\.md\)", text) is not None


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, example_files, tmp_path, monkeypatch):
    document = BLOCKS.parse(ROOT / page)
    here = tmp_path / "page"
    shutil.copytree(example_files, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    if page != EXAMPLES and _uses_examples(document.text):
        given = BLOCKS.parse(ROOT / EXAMPLES)
        for example in given:
            example.evaluate()
        document.namespace.update(given.namespace)
    for example in document:
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_in_a_language_that_would_not_run(page):
    languages = set(re.findall(r"^ *```(\S+)", (ROOT / page).read_text(), flags=re.M))
    assert languages <= {"python", "sh", "text", "json", "jsonl", "toml", "yaml"}


def test_what_does_not_run_is_still_there_and_needs_no_exemption_otherwise():
    lines = {
        (page, command)
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
        for command, _ in _shell_lines(block)
    }
    assert set(EXEMPT) <= lines, f"no longer in the pages: {sorted(set(EXEMPT) - lines)}"
    assert all(EXEMPT.values())
