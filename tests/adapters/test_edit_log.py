"""The record of edits belongs to the weights beside it."""

from __future__ import annotations

import hashlib
import json

import pytest

from lorakit.adapters.edit_log import RECORD_NAME, read_edits, write_edits

EDITS = [{"policy": "abs_select", "modules": []}, {"policy": "SmoothAbs", "modules": []}]


@pytest.fixture(params=["adapter_model.safetensors", "adapter_model.bin"])
def weights(tmp_path, request):
    path = tmp_path / request.param
    path.write_bytes(b"first")
    return path


def test_edits_are_read_as_they_were_written(tmp_path, weights):
    assert read_edits(tmp_path) == []
    write_edits(tmp_path, EDITS)
    assert read_edits(tmp_path) == EDITS
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    assert record["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    write_edits(tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [weights.name]


def test_a_record_of_other_weights_is_ignored_with_a_warning(tmp_path, weights):
    write_edits(tmp_path, EDITS)
    weights.write_bytes(b"second")
    with pytest.warns(RuntimeWarning, match=r"lorakit_surgery.json' is ignored: its `weights_sha256` is not that of"):
        assert read_edits(tmp_path) == []
    weights.unlink()
    with pytest.warns(RuntimeWarning, match="weights_sha256"):
        assert read_edits(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "it cannot be read"),
        (b"\xff", "it cannot be read"),
        (b"[" * 100_000, "it cannot be read"),
        (b"[]", "it has no list of `edits`"),
        (b'{"edits": 1}', "it has no list of `edits`"),
        (b'{"edits": [1]}', "it has no list of `edits`"),
        (b'{"edits": []}', "its `weights_sha256` is not that"),
    ],
)
def test_a_broken_record_is_ignored_with_a_warning(tmp_path, weights, content, reason):
    (tmp_path / RECORD_NAME).write_bytes(content)
    with pytest.warns(RuntimeWarning, match=reason):
        assert read_edits(tmp_path) == []


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, weights):
    write_edits(tmp_path, EDITS)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_edits(tmp_path, [{"policy": object()}])
    assert read_edits(tmp_path) == EDITS
    assert len(list(tmp_path.iterdir())) == 2
