"""Hostile inputs, kept as data in the JSON files here, and a runner for every command over them."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from attacks import CONFIG, GOOD, MODULES, WEIGHTS
from safetensors.torch import save_file

from lorakit.cli import main


@pytest.fixture
def write(tmp_path):
    """Writes an adapter of rank 4 for the tiny base model, or for modules of other names."""

    def make(name="adapter", *, modules=MODULES, config=None, fill=None, d=32):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for module in modules:
            rows = 16 if module.endswith("v_proj") and d == 32 else d  # grouped-query attention
            for half, shape in (("A", (4, d)), ("B", (rows, 4))):
                values = torch.randn(shape, generator=generator) if fill is None else torch.full(shape, float(fill))
                tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
        save_file(tensors, directory / WEIGHTS)
        text = json.dumps(GOOD) if config is None else config
        (directory / CONFIG).write_text(text, encoding="utf-8", errors="surrogatepass")
        return directory

    return make


@pytest.fixture
def run():
    """Runs a command in this process, and checks what holds for every command over any input."""

    def command(*arguments):
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        words = ["lorakit", *map(str, arguments)]
        with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
        done = SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
        said = f"{words}\ncode {code}\n{done.out[-2000:]}\n{done.err[-2000:]}"
        assert code in (0, 1, 2, 3), said
        assert "Traceback" not in done.err, said
        for text in (done.out, done.err):
            bare = text.replace("\n", "").replace("\r", "" if text is done.err else "\r").replace("\x1b[A", "")
            assert bare.isprintable(), f"{[c for c in bare if not c.isprintable()][:5]} in {said!r}"
        if code == 2:
            assert done.out == "", said
            assert "lorakit: " in done.err or "Usage: " in done.err, said
        elif "--json" in words:
            assert isinstance(json.loads(done.out, parse_constant=pytest.fail), dict), said
        return done

    return command
