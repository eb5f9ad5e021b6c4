"""Files are written whole: through links, into pipes and devices, with nothing left beside them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorakit._files import make_file, write_file


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("content", ["text\n€", b"\0bytes"])
def test_a_new_file_in_a_directory_that_is_made(tmp_path, content):
    target = tmp_path / "a" / "b" / "report.html"
    assert write_file(target, content) == target
    assert target.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(target.parent) == ["report.html"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


def test_text_that_is_not_unicode_is_written_with_question_marks(tmp_path):
    assert write_file(tmp_path / "a", "x\udcff").read_bytes() == b"x?"


def test_a_file_keeps_its_mode_and_is_replaced_not_rewritten(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    target.chmod(0o640)
    with target.open() as opened:
        write_file(target, "new")
        assert opened.read() == "old"
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", 0o640)


@pytest.mark.parametrize("exists", [True, False])
def test_links_stay_and_their_target_is_written(tmp_path, exists):
    target = tmp_path / "far" / "file.html"
    if exists:
        write_file(target, "old")
    (tmp_path / "second").symlink_to("far/file.html")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    write_file(tmp_path / "first", "new")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert target.read_text() == "new"
    assert (names(tmp_path), names(target.parent)) == (["far", "first", "second"], ["file.html"])


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "a", "new")
    assert names(tmp_path) == ["a", "b"]


def test_a_pipe_gets_the_content(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to("fifo")
    for path in (fifo, tmp_path / "link"):
        read = []
        reader = threading.Thread(target=lambda read=read: read.append(fifo.read_bytes()))
        reader.start()
        write_file(path, b"x" * 200_000)
        reader.join()
        assert read == [b"x" * 200_000]
        assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert names(tmp_path) == ["fifo", "link"]


def test_a_device_gets_the_content_and_stays(tmp_path):
    write_file("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_file("/dev/full", "x")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_keeps_its_place_also_where_it_is_a_file(tmp_path, name):
    (tmp_path / "link").symlink_to("/dev/stdout")
    program = (
        f"from lorakit._files import write_file\nprint('before')\nwrite_file({name!r}, 'content\\n')\nprint('after')"
    )
    expected = "before\ncontent\nafter\n"
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (piped.stdout, piped.stderr) == (expected, "")
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, cwd=tmp_path, check=True)
    assert (tmp_path / "out").read_text() == expected


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"A file's path is needed; '.*' is a directory. Add a file's name."):
        write_file(tmp_path, "x")


def test_a_file_where_a_directory_is_needed_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OSError, match="exists|directory"):
        write_file(tmp_path / "a" / "b", "x")
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("kind", ["new", "old", "link", "device"])
def test_an_error_leaves_everything_as_it_was(tmp_path, error, kind, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = Path("/dev/null") if kind == "device" else tmp_path / "target"
    if kind == "old":
        target.write_text("old")
    if kind == "link":
        (tmp_path / "far").write_text("old")
        target.symlink_to("far")
    before = names(tmp_path)

    def make(staging):
        staging.write_text("half")
        raise error("here")

    with pytest.raises(error):
        make_file(target, make)
    assert names(tmp_path) == before
    assert kind not in ("old", "link") or target.read_text() == "old"


def test_the_result_and_the_suffix(tmp_path):
    assert make_file(tmp_path / "a.png", lambda staging: (staging.write_text("x"), staging.suffix)) == (1, ".png")


@pytest.mark.parametrize("name", ["x" * 255, "x." + "y" * 253])
def test_the_longest_names(tmp_path, name):
    write_file(tmp_path / name, "x")
    assert names(tmp_path) == [name]
