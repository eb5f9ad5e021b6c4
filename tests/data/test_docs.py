"""The code in docs/data.md runs as it stands, beside a directory with a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_page_s_code_runs(base_model, tmp_path, monkeypatch, capsys):
    base_model.rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 1
    assert "DataReport: 16 examples from 16 of 20 rows of train.jsonl" in capsys.readouterr().out
