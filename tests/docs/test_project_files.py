"""Files beside the code: the citation, the links between pages, the templates, and what `make help` lists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import lorakit

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lorakit.__version__
    assert all({"title", "authors", "type"} <= set(reference) for reference in citation["references"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_are_named_are_there(page):
    named = re.findall(r"`((?:lorakit|tests|docs)/[\w/.]+)`", (ROOT / page).read_text())
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_the_forges_files_parse(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        assert content["jobs"]
        assert content["permissions"] == {"contents": "read"}
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= set(content)


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    # Also where the tests themselves run under make, which then says which directory it enters.
    command = ["make", "-s", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(targets[1].split())
