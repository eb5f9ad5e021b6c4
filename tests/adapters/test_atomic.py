"""Directories are replaced whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lorakit.adapters import atomic, open_adapter
from lorakit.adapters.atomic import replaced_directory, write_adapter


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


def test_the_config_is_replaced_last_where_directories_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
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


def test_an_existing_directory_is_exchanged_whole_and_keeps_its_other_files(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "state").write_text("state")
    (out / "link").symlink_to("checkpoint/state")
    (out / "a").write_text("old")
    out.chmod(0o750)
    inode = (out / "checkpoint" / "state").stat().st_ino
    with atomic.replaced_directory(out) as staging:
        (staging / "a").write_text("new")
        assert (out / "a").read_text() == "old"
    assert {path.name for path in out.iterdir()} == {"a", "checkpoint", "link"}
    assert ((out / "a").read_text(), (out / "link").read_text()) == ("new", "state")
    assert (out / "checkpoint" / "state").stat().st_ino == inode  # not copied
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with atomic.replaced_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"


def test_files_and_directories_that_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), atomic.replaced_directory(tmp_path / "file"):
        pass
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may do anything
    with pytest.raises(PermissionError, match="may not be written to"), atomic.replaced_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


# Each dies by SIGKILL at another point of a write over an adapter of rank 1, one of rank 2.
KILLED = {
    "before the weights": "atomic.save_file = die",
    "between weights and config": "atomic._plain_json = die",
    "before the exchange": "atomic._exchanged = die",
    "after the exchange": "shutil.rmtree = die",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLED)
def test_a_killed_write_leaves_one_whole_adapter(tmp_path, run_python, where):
    out = tmp_path / "out"
    code = f"""
        import os, shutil, signal
        import torch
        from lorakit.adapters import atomic, open_adapter
        def die(*args, **options):
            os.kill(os.getpid(), signal.SIGKILL)
        def write(rank):
            tensors = {{"m.lora_A.weight": torch.ones(rank, 3), "m.lora_B.weight": torch.ones(2, rank)}}
            with atomic.replaced_directory({str(out)!r}) as directory:
                atomic.write_adapter(directory, tensors, {{"peft_type": "LORA", "r": rank, "lora_alpha": 1}})
        write(1)
        {KILLED[where]}
        write(2)
    """
    assert run_python(code, check=False).returncode == -9
    adapter = open_adapter(out)
    adapter.check()
    assert [module.rank for module in adapter.modules] == [2 if where == "after the exchange" else 1]


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_the_weights(tmp_path, run_python):
    code = f"""
        import resource, signal
        import torch
        from lorakit.adapters import atomic, open_adapter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            with atomic.replaced_directory({str(tmp_path / "out")!r}) as directory:
                atomic.write_adapter(directory, {{"a": torch.ones(100, 100)}}, {{}})
        except OSError as error:
            print(error)
    """
    assert "could not be written" in run_python(code).stdout
    assert list(tmp_path.iterdir()) == []
