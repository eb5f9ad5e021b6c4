"""Which rows become examples, how long ones are cut, what is counted, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from chats import MARKED, PLAIN, said
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lorakit.calibration import IGNORED_LABEL
from lorakit.data import as_loader, loader
from lorakit.data._formats import Encoded
from lorakit.data._loader import cut
from lorakit.errors import DataError

TEXTS = [{"text": f"the sky {i}"} for i in range(20)]


def texts_of(batches, tokenizer):
    return [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_batches_are_tensors_padded_on_the_right(make_tokenizer, write):
    tokenizer = make_tokenizer()
    path = write("a.jsonl", [{"text": "the sky"}, {"text": "is"}, {"prompt": "light", "completion": " of"}])
    found = loader(path, tokenizer, batch_size=2)
    assert isinstance(found, DataLoader)
    first, second = found
    assert {name: (value.dtype, value.shape) for name, value in first.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, first["input_ids"].shape)
    )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    n = int(first["attention_mask"][1].sum())
    assert first["input_ids"][1].tolist()[n - 1 :] == [end] + [pad] * (first["input_ids"].shape[1] - n)
    assert first["labels"][1].tolist()[n:] == [IGNORED_LABEL] * (first["input_ids"].shape[1] - n)
    assert second["labels"][0].tolist()[-1] == end
    assert pickle.loads(pickle.dumps(found.collate_fn)) == found.collate_fn  # so that workers can have it
    again = DataLoader(found.dataset, batch_size=2, collate_fn=found.collate_fn, num_workers=1)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(found, again, strict=True) for k in a)


def test_which_rows_are_used_depends_on_seed_start_and_number_alone(make_tokenizer):
    tokenizer, data = make_tokenizer(), Dataset.from_list(TEXTS)
    texts = [row["text"] for row in TEXTS]

    def used(**options):
        return texts_of(loader(data, tokenizer, **options), tokenizer)

    assert used() == texts
    assert used(start=3, num_examples=4, batch_size=3) == texts[3:7]
    assert used(start=18, num_examples=9) == texts[18:]
    order = np.random.default_rng(5).permutation(20)
    assert used(shuffle_seed=5) == [texts[i] for i in order] == list(data.shuffle(seed=5)["text"])
    assert used(shuffle_seed=5, start=4, num_examples=6) == [texts[i] for i in order[4:10]]
    assert used(shuffle_seed=6) != used(shuffle_seed=5)


def test_dropped_rows_are_not_replaced_by_others(make_tokenizer):
    rows = [{"prompt": "a", "completion": " b"}] * 4
    rows[1] = {"prompt": "a", "completion": ""}
    data, tokenizer = Dataset.from_list(rows), make_tokenizer(eos_token=None)
    found = loader(data, tokenizer, num_examples=2)
    assert (found.report.num_examples, found.report.num_read, found.report.num_dropped) == (1, 2, 1)


def test_a_long_example_loses_the_prompt_s_beginning_and_not_the_answer(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "what do you know of light and long waves?", "completion": " the sky is blue"}]
    (whole,) = loader(Dataset.from_list(rows), tokenizer)
    ids, labels = whole["input_ids"][0].tolist(), whole["labels"][0].tolist()
    answer = [label for label in labels if label != IGNORED_LABEL]
    for length in range(2, len(ids) + 1):
        found = loader(Dataset.from_list(rows), tokenizer, length=length)
        (batch,) = found
        kept = min(length, len(answer))
        assert batch["labels"][0].tolist() == [IGNORED_LABEL] * (length - kept) + answer[:kept]
        expected = ids[-length:] if length >= len(answer) else answer[:length]
        assert batch["input_ids"][0].tolist() == expected
        report = found.report
        assert (report.num_prompts_cut, report.num_answers_cut) == (length < len(ids), length < len(answer))
        assert report.num_labels == kept


def test_bos_stays_and_does_not_predict_what_follows_the_gap(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN, bos=True)
    rows = [{"prompt": "what do you know of light and long waves?", "completion": " the sky"}]
    (batch,) = loader(Dataset.from_list(rows), tokenizer, length=8)
    (whole,) = loader(Dataset.from_list(rows), tokenizer)
    assert batch["input_ids"][0].tolist() == [tokenizer.bos_token_id, *whole["input_ids"][0].tolist()[-7:]]
    tokenizer = make_tokenizer("<s>" + PLAIN)
    chat = Dataset.from_list([{"messages": said("what do you know of light?", "the sky")}])
    (batch,) = loader(chat, tokenizer, length=8)
    (whole,) = loader(chat, tokenizer)
    assert batch["labels"][0].tolist() == [
        tokenizer.bos_token_id,
        IGNORED_LABEL,
        *whole["labels"][0].tolist()[-6:],
    ]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_long_chat_keeps_its_last_answer(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    rows = [{"messages": said("what is blue?", "the sky", "and what do you know of light?", "long waves")}]
    (batch,) = loader(Dataset.from_list(rows), tokenizer, length=8)
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("\nlong waves<|im_end|>\n")
    learned = batch["labels"][0]
    assert tokenizer.decode(learned[learned != IGNORED_LABEL]).endswith(
        "long waves<|im_end|>" if template is MARKED else "long waves<|im_end|>\n"
    )


@given(st.integers(0, 12), st.integers(0, 12), st.integers(2, 20), st.booleans())
def test_cutting_keeps_a_suffix_of_the_prompt_and_a_prefix_of_the_answer(prompt, answer, length, bos):
    ids = [1] * bos + list(range(10, 10 + prompt)) + list(range(50, 50 + answer))
    start = bos + prompt
    labels = [IGNORED_LABEL] * start + ids[start:]
    found, found_labels, prompt_cut, answer_cut = cut(Encoded(ids, labels, start), length, 1)
    assert len(found) == len(found_labels) == min(length, len(ids))
    body = found[bos:]
    given_, said_ = [i for i in body if i < 50], [i for i in body if i >= 50]
    assert found[:bos] == [1] * bos
    assert given_ == list(range(10, 10 + prompt))[prompt - len(given_) :]
    assert said_ == list(range(50, 50 + answer))[: len(said_)]
    assert not given_ or len(said_) == answer  # no token of the answer goes before all of the prompt
    learned = said_[1:] if bos and prompt and not given_ else said_  # BOS does not predict what the gap precedes
    assert [label for label in found_labels if label != IGNORED_LABEL] == learned
    assert (prompt_cut, answer_cut) == (len(given_) < prompt, len(said_) < answer)


def test_the_report_counts_and_says_it(make_tokenizer, write):
    rows = [
        {"prompt": "what is", "completion": " blue"},
        {"prompt": "what do you know of light and waves?", "completion": " sky"},
        {"prompt": "the ", "completion": "sky is scattered more because of long waves"},
        {"prompt": "a", "completion": ""},
    ]
    path = write("a.jsonl", rows)
    report = loader(path, make_tokenizer(eos_token=None), length=6).report
    assert (report.num_rows, report.num_examples, report.num_dropped) == (4, 3, 1)
    assert (report.num_prompts_cut, report.num_answers_cut, report.num_prompts_changed) == (2, 1, 1)
    assert report.num_tokens >= report.num_labels > 0
    text = repr(report)
    assert text.startswith(f"DataReport: 3 examples from 4 of 4 rows of {path}, ")
    for part in ("1 dropped", "2 lost the beginning of the prompt", "1 lost the end of the answer", "1 prompts end in"):
        assert part in text
    assert "has no EOS token" in text
    assert report.to_dict()["num_dropped"] == 1
    assert "has no EOS" not in repr(loader(path, make_tokenizer()).report)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"words": "x"}], {}, r"must have the columns `prompt` and `completion` or .*; they have 'words'\. Name the"),
        ([{"text": "x"}], {"columns": {"text": "words"}}, r"`columns` names 'words', which .* does not have: 'text'"),
        ([{"text": "x"}], {"columns": {"prompt": "text"}}, r"`columns` must give columns for .*; got 'prompt'"),
        ([{"text": 3}], {}, r"Row 1 of .*: `text` must be a string; got int"),
        ([{"text": "x"}, {"text": None}], {}, r"Row 2 of .* must have `text`, or .*; got none"),
        (
            [{"prompt": "x", "completion": [{"role": "a", "content": "b"}]}],
            {},
            "must both be strings, or both messages; got str and list",
        ),
        ([{"messages": "x"}], {}, "`messages` must be a list of messages; got str"),
        ([{"messages": []}], {}, "got an empty list"),
        ([{"messages": [{"role": "user"}]}], {}, r"message 1 must have the string `content`; got NoneType"),
        ([{"messages": [{"content": "x"}]}], {}, r"message 1 must have the string `role`; got 'content'"),
        ([{"messages": ["x"]}], {}, r"message 1 must be an object; got str"),
        ([{"messages": said("a", "b")}], {}, r"Row 1 of .* is a chat, and the tokenizer has no chat template"),
        ([{"messages": said("a"), "tools": "[1"}], {}, "`tools` is a string that is no JSON"),
        ([{"text": "x"}], {"start": 1}, r"`start` must be below the number of rows, 1; got 1"),
        ([{"text": "x"}], {"assistant_only": True}, "needs a chat template with `{% generation %}`"),
        ([{"text": "x"}], {"split": "test"}, "`split` is for a dataset id"),
    ],
)
def test_rows_and_settings_that_do_not_fit(make_tokenizer, rows, options, message):
    with pytest.raises(DataError, match=message):
        loader(Dataset.from_list(rows), make_tokenizer(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "`length` must be an integer of at least 2; got 1"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"num_examples": 0}, "`num_examples` must be a positive integer"),
        ({"start": -1}, "`start` must be a non-negative integer"),
        ({"shuffle_seed": True}, "`shuffle_seed` must be a non-negative integer; got True"),
    ],
)
def test_wrong_arguments(make_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        loader(Dataset.from_list(TEXTS), make_tokenizer(), **options)


def test_what_the_template_refuses_is_a_typed_error(make_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"Row 1 of .*the chat template does not take these .*: roles must alternate"):
        loader(Dataset.from_list([{"messages": said("a", "b")}]), make_tokenizer(template))


def test_where_no_example_has_a_label(make_tokenizer):
    bos = make_tokenizer("<s>" + PLAIN)
    with pytest.raises(DataError, match=r"None of the 1 rows read of .* 1 lost all of theirs .*\. Raise `length`\."):
        loader(Dataset.from_list([{"messages": said("what", "the sky")}]), bos, length=2)
    with pytest.raises(DataError, match=r"marks nothing that the assistant says\. Give answers"):
        loader(Dataset.from_list([{"messages": said("what")}]), make_tokenizer(MARKED))
    with pytest.raises(DataError, match="their texts or completions are empty"):
        loader(Dataset.from_list([{"text": ""}]), make_tokenizer())


def test_keys_of_other_messages_are_not_there(make_tokenizer):
    """`datasets` gives every message the keys of all, without values; templates ask whether a key is there."""
    template = "{% for m in messages %}{{ m['content'] }}{% if 'name' in m %} by {{ m['name'] }}{% endif %}{% endfor %}"
    chat = [{"role": "user", "content": "sky", "name": "ann"}, {"role": "assistant", "content": "blue"}]
    tokenizer = make_tokenizer(template)
    assert texts_of(loader(Dataset.from_list([{"messages": chat}]), tokenizer), tokenizer) == ["sky by annblue"]


def test_as_loader(base_model, make_tokenizer, write, tiny_llama):
    path = write("a.jsonl", [{"text": "w1 w2 w3"}])
    batches = [{"input_ids": torch.ones(1, 2)}]
    assert as_loader(batches) is batches
    assert as_loader(path, make_tokenizer(), length=4).report.length == 4
    from transformers import AutoModelForCausalLM

    (batch,) = as_loader(path, AutoModelForCausalLM.from_pretrained(base_model))
    assert batch["input_ids"].tolist() == [[3, 4, 5]]
    with pytest.raises(DataError, match="does not say where it was loaded from"):
        as_loader(path, tiny_llama())
    with pytest.raises(DataError, match="`tokenizer` must be given with a path"):
        as_loader(path)
    with pytest.raises(TypeError, match="`length` cannot be applied to batches"):
        as_loader(batches, length=4)
    with pytest.raises(TypeError, match="must yield batches, or be a path, id or Dataset; got int"):
        as_loader(3)
