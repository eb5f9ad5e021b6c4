"""The documentation's site: it builds without a warning or a download, and its reference has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit import _lazy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    # A proxy that does not answer: whoever fetched something would fail.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    for package in _lazy._FILES:
        page = (site / "reference" / package / "index.html").read_text()
        anchors = set(re.findall(r'id="([\w.]+)"', page))
        listed = {f"{package}.{name}" for name in _lazy.exports(package) if not name.startswith("__")}
        modules = set(_lazy.exports(package).values())  # these have pages of their own
        missing = {name for name in listed - modules if name not in anchors}
        assert not missing, f"{package}: {sorted(missing)}"
        for module in listed & modules:
            assert (site / "reference" / module / "index.html").is_file(), module


@pytest.mark.slow
def test_readers_of_the_site_fetch_nothing_from_elsewhere(site):
    pages = [page.read_text() for page in site.rglob("*.html")]
    assert len(pages) > 20
    fetched = {
        found
        for page in pages
        for found in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    }
    assert not fetched
