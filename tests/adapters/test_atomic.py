"""Directories are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest

from lorakit.adapters import atomic
from lorakit.adapters.atomic import replaced_directory


def test_a_new_directory_appears_in_one_step(tmp_path):
    out = tmp_path / "deep" / "out"
    with replaced_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
        assert staging.parent.parent == out.parent  # the same file system
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
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    (tmp_path / "adapter_config.json").write_text("old")
    (tmp_path / "record").write_text("old")
    replaced = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, target: (replaced.append(self.name), replace(self, target))
    )
    with replaced_directory(tmp_path, remove=["record"]) as staging:
        for name in ("adapter_config.json", "adapter_model.safetensors", "zzz"):
            (staging / name).write_text("new")
    assert replaced[-1] == "adapter_config.json"
    assert len(replaced) == 3
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(replaced, "new")


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


def test_a_shell_that_stands_in_the_directory_finds_the_new_files(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b", "old"):
        (out / name).write_text("old")
    monkeypatch.chdir(out)
    inode = out.stat().st_ino
    with replaced_directory(".", remove=["b", "old", "absent"]) as staging:
        for name in ("a", "b", "new"):
            (staging / name).write_text("new")
    assert out.stat().st_ino == inode
    assert os.getcwd() == str(out)
    assert {name: Path(name).read_text() for name in os.listdir(".")} == dict.fromkeys(("a", "b", "new"), "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directories_replace_directories_and_files(tmp_path):
    out = tmp_path / "out"
    (out / "directory").mkdir(parents=True)
    (out / "directory" / "old").write_text("old")
    (out / "file").write_text("old")
    (out / "gone").mkdir()
    (out / "gone" / "old").write_text("old")
    with replaced_directory(out, remove=["gone"]) as staging:
        for name in ("directory", "file"):
            (staging / name).mkdir()
            (staging / name / "new").write_text("new")
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == [
        "directory", "directory/new", "file", "file/new",
    ]  # fmt: skip


@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_files_that_appear_meanwhile_are_kept(tmp_path, monkeypatch, when, number, interrupted):
    """Before or after the first or second exchange of directories; each file by itself, or by a rename over another."""
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    for name in ("a", "logs/replaced", "deleted"):
        (out / name).write_text("old")
    exchange, calls = atomic._exchange, []

    def appear():
        if len(calls) != number:
            return
        for name in ("logs/first", "second", "partial"):
            (out / name).write_text("meanwhile")
        (out / "partial").replace(out / "logs" / "replaced")
        (out / "deleted").unlink()

    def exchanged(one, other):
        calls.append(one)
        if when == "before":
            appear()
        done = exchange(one, other)
        if when == "after":
            appear()
            if interrupted and len(calls) == number:
                raise KeyboardInterrupt
        elif interrupted and len(calls) == number:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(atomic, "_exchange", exchanged)
    expected = {"a": "new", "logs/first": "meanwhile", "logs/replaced": "meanwhile", "second": "meanwhile"}
    with contextlib.suppress(KeyboardInterrupt), replaced_directory(out) as staging:
        (staging / "a").write_text("new")
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    found.pop("deleted", None)  # after an interrupt or between the exchanges it may come back
    assert found == expected
    assert len(calls) == (1 if interrupted and number == 1 else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITE = """
    import os, shutil, signal, sys
    import torch
    from safetensors.torch import save_file
    from lorakit.adapters import atomic, open_adapter
    from lorakit.adapters.edit_log import RECORD_NAME, read_edits, write_edits
    out = sys.argv[1] if len(sys.argv) > 1 else {out!r}
    def write(rank):
        tensors = {{"m.lora_A.weight": torch.ones(rank, 3), "m.lora_B.weight": torch.ones(2, rank)}}
        with atomic.replaced_directory(out, remove=[RECORD_NAME]) as directory:
            save_file(tensors, directory / atomic.WEIGHTS_NAME)
            atomic.write_config(directory, {{"peft_type": "LORA", "r": rank, "lora_alpha": 1}})
            if rank == 1:
                write_edits(directory, [{{"policy": "p"}}])
    def rank():
        adapter = open_adapter(out)
        adapter.check()
        (module,) = adapter.modules
        assert os.path.exists(os.path.join(out, RECORD_NAME)) == (module.rank == 1)
        read_edits(out)
        assert open(os.path.join(out, "notes")).read() == "mine"
        return module.rank
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_write_that_ends_at_any_line_leaves_one_whole_adapter(tmp_path, run_python, how):
    """A write of rank 2 over rank 1, once for each line of atomic.py that it goes through, ended before that line."""
    out = tmp_path / "out"
    code = (
        WRITE.format(out=str(out))
        + f"""
    import warnings
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    def end():
        if {how == "killed"}:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.settrace(None)
        raise KeyboardInterrupt
    def run_until(line):
        count = 0
        def trace(frame, event, _):
            nonlocal count
            if frame.f_code.co_filename != atomic.__file__:
                return None
            if event == "line":
                count += 1
                if count == line:
                    end()
            return trace
        sys.settrace(trace)
        try:
            write(2)
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    ranks, status, line = [], 1, 0
    while status:
        line += 1
        shutil.rmtree(out, ignore_errors=True)
        write(1)
        open(os.path.join(out, "notes"), "w").write("mine")
        child = os.fork()
        if not child:
            run_until(line)
        status = os.waitpid(child, 0)[1]
        ranks.append(rank())
    print(*ranks)
    """
    )
    ranks = run_python(code).stdout.split()
    assert len(ranks) > 60
    first_new = ranks.index("2")
    assert ranks == ["1"] * first_new + ["2"] * (len(ranks) - first_new)
    assert 30 < first_new < len(ranks) - 20  # lines of both kinds were reached


@pytest.mark.slow
def test_processes_that_replace_one_directory_at_once_leave_one_whole_adapter(tmp_path, run_python):
    out = tmp_path / "out"
    code = (
        WRITE.format(out=str(out))
        + """
    torch.set_num_threads(1)
    write(1)
    open(os.path.join(out, "notes"), "w").write("mine")
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            for i in range(40):
                write(1 + (i + number) % 3)
            os._exit(0)
        children.append(child)
    print([os.waitpid(child, 0)[1] for child in children], rank())
    """
    )
    assert run_python(code).stdout.split("]")[0] == "[0, 0, 0"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_disk_that_is_too_small_for_the_weights(tmp_path, run_python):
    code = f"""
        import resource, signal
        import torch
        from lorakit.adapters.atomic import replaced_directory
        from lorakit.adapters.stream import SafetensorsWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            with replaced_directory({str(tmp_path / "out")!r}) as directory:
                SafetensorsWriter(directory / "weights", {{"a": torch.empty(100, 100, device="meta")}})
        except OSError as error:
            print(error)
    """
    assert "File too large" in run_python(code).stdout
    assert list(tmp_path.iterdir()) == []
