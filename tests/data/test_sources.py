"""Reading files and datasets: without the network, whatever is in them, and with errors that lead to the place."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data._sources import is_source, read
from lorakit.errors import DataError

ROWS = [{"prompt": "7", "completion": "None"}, {"prompt": 'a,\n"b"', "completion": "ü"}]


@pytest.mark.slow
def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_csv(tmp_path / "a.csv")
    dataset.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "BOM.JSONL").write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "od[d] na*me?.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = {path.name: list(read(path)) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(found, ROWS)
    assert len(found) == 7
    assert list(read(str(tmp_path / "a.csv"))) == ROWS
    assert list(read(dataset.with_format("numpy"))) == ROWS


def test_a_text_s_paragraphs(write):
    path = write("a.txt", "\n one\ntwo\n\n\n\n  \n\nthree \r\n\r\nfour\n")
    assert read(path)["text"] == ["one\ntwo", "three", "four"]


def test_nothing_stays_in_a_cache(write, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write("a.jsonl", [{"text": "one"}])
    assert read(path)["text"] == ["one"]
    path.write_text(json.dumps({"text": "two"}))
    os.utime(path, (0, 0))
    assert read(path)["text"] == ["two"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_a_file_is_read_without_the_network(write, run_python):
    """Every name that is looked up and every connection is an error, with offline mode off."""
    path = write("a.jsonl", [{"text": "one"}])
    code = f"""
        import socket
        def refuse(*arguments, **options):
            raise AssertionError("the network was used")
        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        from lorakit.data._sources import read
        print(list(read({str(path)!r})["text"]))
        try:
            read("owner/name")
        except Exception as error:
            print(type(error).__name__)
    """
    done = run_python(code, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1")
    assert done.stdout.split() == ["['one']", "DataError"]


def test_the_splits_of_a_dataset():
    data = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})
    assert len(read(data)) == 2
    assert len(read(data, "test")) == 1
    with pytest.raises(DataError, match=r"`split` must be one of train, test; got 'dev'\."):
        read(data, "dev")
    with pytest.raises(DataError, match=r"`split` is for a dataset id or a DatasetDict; got 'dev' with a Dataset\."):
        read(data["train"], "dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": oops}\n', r"a\.jsonl, line 3 is no JSON: Expecting value"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', r"a\.jsonl, line 2 must be an object; got list\."),
        ("a.jsonl", '{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", r"line 1 is no JSON: maximum recursion depth"),
        ("a.jsonl", '{"text": "\\ud800"}', "cannot be read as json: .*surrogate"),
        ("a.jsonl", "", r"'.*a\.jsonl' has no example: the file is empty\."),
        ("a.json", '[{"text": "x"},\n{"text" 1}]', r"'.*a\.json' is no JSON: Expecting ':' delimiter: line 2"),
        ("a.json", '[{"text": "x"}, 3]', r"example 2 must be an object; got int\."),
        ("a.json", '{"text": "x"}\n{"text": }\n', r"a\.json, line 2 is no JSON"),
        ("a.json", "[]", "has no example"),
        ("a.csv", "text\n", "has no example"),
        ("a.csv", "\n \n", "has no example: the file is empty"),
        ("a.csv", "a,a\n1,2\n", r"two columns have one name in \['a', 'a'\]"),
        ("a.csv", "a,b\n1,2\n3,4,5\n", "cannot be read as csv: .*line 3"),
        ("a.csv", "a,b\n1,2,3\n1,2,3\n", "Length of header or names does not match"),
        ("a.txt", "\n\n \n", "has no example"),
        ("a.parquet", "text", "cannot be read as parquet: Parquet file size is 4 bytes"),
        ("a.xml", "<a/>", r"must be a file that ends in \.jsonl, .*'.*a\.xml' ends in '\.xml'\. Pass what"),
    ],
)
def test_files_that_cannot_be_read(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(write(name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_files_in_another_encoding(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match=r"must be UTF-8; got the byte 0xff\. Convert the file\."):
        read(tmp_path / name)


@pytest.mark.slow
def test_rows_that_change_after_many(write):
    path = write("a.jsonl", '{"text": "a long enough text"}\n' * 500_000 + '{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(DataError, match="its later rows have other columns or types than the first"):
        read(path)


def test_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        read(tmp_path / "no.jsonl")
    with pytest.raises(FileNotFoundError, match="nor can it be the id of a dataset"):
        read(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"'owner/name' is no file here, and split 'test' of .* cannot be fetched"):
        read("owner/name", "test")
    with pytest.raises(DataError, match=r"got list\. Other rows become one by `datasets\.Dataset\.from_list"):
        read([{"text": "x"}])
    with pytest.raises(DataError, match="has no example"):
        read(Dataset.from_dict({"text": []}))
    assert [is_source(x) for x in ("a", Path("a"), Dataset.from_list(ROWS), DatasetDict())] == [True] * 4
    assert not is_source([{"input_ids": 1}])


@pytest.mark.slow
@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet"]))
def test_any_bytes_are_rows_or_a_typed_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    path.write_bytes(content)
    try:
        found, message = read(path), str(path)
    except DataError as error:
        found, message = ["no rows"], str(error)
    assert len(found) > 0
    assert str(path) in message
