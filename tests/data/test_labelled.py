"""Documents with labels: which columns, each document once, cut and padded, texts and images."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from classified import sentences, write_bert, write_images, write_lines, write_vit
from datasets import Dataset, DatasetDict, Image

from lorakit.data._labelled import inputs_for, labelled
from lorakit.errors import DataError

COLUMNS = {"text": "sentence", "label": "label"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("bert")
    write_bert(path)
    return AutoTokenizer.from_pretrained(path)


def test_rows_of_a_file_in_their_order_and_each_document_once(tmp_path):
    rows = sentences(6)
    data = labelled(write_lines(tmp_path / "a.jsonl", [*rows, rows[2]]), columns=COLUMNS)
    assert data.contents == tuple((row["sentence"],) for row in rows)
    assert data.labels == tuple(row["label"] for row in rows)
    assert (data.num_copies, data.num_labels, data.has_classes) == (1, 2, True)
    assert len(set(data.documents)) == 6


def test_a_range_of_rows_is_the_loaders(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", sentences(9))
    order = np.random.default_rng(3).permutation(9)[2:6]
    data = labelled(path, columns=COLUMNS, shuffle_seed=3, start=2, num_examples=4)
    assert [content[0] for content in data.contents] == [sentences(9)[i]["sentence"] for i in order]


def test_a_document_has_one_hash_whatever_its_label_and_pairs_have_others():
    rows = Dataset.from_list(
        [{"text": "w1", "text_pair": "w2", "label": 0}, {"text": "w2", "text_pair": "w1", "label": 1}]
    )
    one, other = labelled(rows).documents
    assert one != other
    assert labelled(rows.select_columns(["text", "label"])).documents[0] not in (one, other)
    changed = Dataset.from_list([{"text": "w1", "text_pair": "w2", "label": 1}])
    assert labelled(changed).documents == (one,)


def test_pairs_are_tokenized_together_cut_at_the_longer_and_padded_in_a_batch(tokenizer):
    rows = [{"text": "w1 w2 w3 w4 w5", "text_pair": "w6", "label": 1}, {"text": "w7", "text_pair": "w8", "label": 0}]
    inputs = inputs_for(labelled(Dataset.from_list(rows)), tokenizer, 6)
    batch = inputs.collate_fn([inputs.examples[0], inputs.examples[1]])
    ids = tokenizer.get_vocab()
    cut = ["[CLS]", "w1", "w2", "[SEP]", "w6", "[SEP]"]
    short = ["[CLS]", "w7", "[SEP]", "w8", "[SEP]", "[PAD]"]
    assert batch["input_ids"].tolist() == [[ids[word] for word in words] for words in (cut, short)]
    assert batch["attention_mask"].sum(1).tolist() == [6, 5]
    assert batch["labels"].tolist() == [1, 0]


def test_labels_that_are_no_integers_are_numbers():
    rows = Dataset.from_list([{"text": "w1", "label": 0.5}, {"text": "w2", "label": 3.0}])
    data = labelled(rows)
    assert (data.labels, data.num_labels, data.has_classes) == ((0.5, 3.0), 1, False)


def test_classes_of_a_csv_are_read_as_integers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nw1,0\nw2,12\n")
    assert labelled(tmp_path / "a.csv").labels == (0, 12)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1", "label": -1}, "`label` must be a class, an integer from 0; got -1"),
        ({"text": "w1", "label": "good"}, "got 'good'"),
        ({"text": "w1", "label": None}, "got None"),
        ({"text": "w1", "label": float("inf")}, "got inf"),
        ({"text": 3, "label": 1}, "a text must be a string; got int"),
    ],
)
def test_rows_that_are_no_documents_are_errors_that_name_them(row, message):
    with pytest.raises(DataError, match="^Row 1 of") as error:
        labelled(Dataset.from_list([row]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "columns",
    [
        None,
        {"text": "sentence"},
        {"text": "sentence", "label": "none"},
        {"image": "sentence", "text": "x", "label": "label"},
    ],
)
def test_columns_that_are_missing_or_of_no_form_are_errors(columns):
    with pytest.raises(DataError, match="`columns` must name the columns of"):
        labelled(Dataset.from_list(sentences(2)), columns=columns)


def test_a_subset_is_for_a_dataset_id_and_named_in_the_error(tmp_path):
    with pytest.raises(DataError, match="`subset` is for a dataset id; got 'cola' with"):
        labelled(write_lines(tmp_path / "a.jsonl", sentences(2)), columns=COLUMNS, subset="cola")


def test_a_subset_and_a_split_reach_the_library_that_fetches(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, *, split):
        calls.append((name, subset, split))
        return Dataset.from_list(sentences(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(labelled("nyu-mll/glue", columns=COLUMNS, subset="cola", split="validation").labels) == 2
    assert calls == [("nyu-mll/glue", "cola", "validation")]


def test_a_split_of_a_dataset_dict():
    rows = DatasetDict(train=Dataset.from_list(sentences(3)), test=Dataset.from_list(sentences(2, seed=1)))
    assert len(labelled(rows, columns=COLUMNS, split="test").labels) == 2


def test_a_directory_of_images_has_a_class_for_each_folder_and_pixels_in_batches(tmp_path):
    from transformers import AutoImageProcessor

    write_vit(tmp_path / "vit")
    data = labelled(write_images(tmp_path / "images", 6))
    assert sorted(data.labels) == [0, 0, 0, 1, 1, 1]
    assert data.has_images
    inputs = inputs_for(data, AutoImageProcessor.from_pretrained(tmp_path / "vit"), 1)
    batch = inputs.collate_fn([inputs.examples[i] for i in range(6)])
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    bright = batch["pixel_values"].mean((1, 2, 3)) > 0
    assert torch.equal(bright.long(), batch["labels"])


def test_images_of_a_dataset_are_hashed_by_their_bytes(tmp_path):
    from PIL import Image as Picture

    content = io.BytesIO()
    Picture.new("L", (3, 3), 7).save(content, "png")
    rows = Dataset.from_dict({"img": [{"bytes": content.getvalue(), "path": None}] * 2, "fine": [4, 4]})
    data = labelled(rows.cast_column("img", Image()), columns={"image": "img", "label": "fine"})
    assert (data.contents, data.labels, data.num_copies) == ((content.getvalue(),), (4,), 1)
    with pytest.raises(DataError, match="must have images"):
        labelled(Dataset.from_list([{"image": "a.png", "label": 0}]))


def test_the_hash_of_a_text_is_of_its_json():
    import hashlib

    rows = Dataset.from_list([{"text": "w1 w2", "label": 0}])
    assert labelled(rows).documents == (hashlib.sha256(json.dumps(["w1 w2"]).encode()).hexdigest(),)
