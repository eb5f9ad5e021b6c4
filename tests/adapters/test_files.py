"""Directories are replaced whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lorakit.adapters.files import replaced_directory, write_adapter


def test_a_new_directory_appears_in_one_step(tmp_path):
    out = tmp_path / "deep" / "out"
    with replaced_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
        assert staging.parent == out.parent
    assert (out / "a").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    def write():
        with replaced_directory(tmp_path / "out") as staging:
            (staging / "a").write_text("1")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_replaced_last(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("old")
    replaced = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, target: (replaced.append(self.name), replace(self, target))
    )
    with replaced_directory(tmp_path) as staging:
        for name in ("adapter_config.json", "adapter_model.safetensors", "zzz"):
            (staging / name).write_text("new")
    assert replaced[-1] == "adapter_config.json"
    assert len(replaced) == 3
    assert (tmp_path / "adapter_config.json").read_text() == "new"


def test_another_process_may_make_the_same_directory_meanwhile(tmp_path, monkeypatch):
    rename = type(tmp_path).rename

    def second(self, target):
        target.mkdir()
        (target / "a").write_text("1")
        return rename(self, target)

    with replaced_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
        monkeypatch.setattr(type(tmp_path), "rename", second)
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_that_share_memory_are_each_written(tmp_path):
    shared = torch.arange(6.0)
    write_adapter(tmp_path, {"a": shared, "b": shared, "c": shared.view(2, 3).T}, LoraConfig())
    loaded = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["c"], shared.view(2, 3).T)
