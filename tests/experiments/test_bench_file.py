"""A bench's YAML file: its arguments, and what is wrong with it by file and key."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from lorakit import experiments
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions
from lorakit.experiments import read_bench_file

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "bench.md"
GOOD = """
base: base/
train: train.jsonl
tasks: test.jsonl
margin: 0.02
probe: {r: 8, lora_alpha: 16}
directory: bench/
steps: 10
learning_rate: 2e-4
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "bench.yaml"
        path.write_text(text)
        return path

    return write


def test_a_file_with_what_is_needed(write):
    assert read_bench_file(write(GOOD)) == {
        "base": "base/",
        "train": "train.jsonl",
        "tasks": ["test.jsonl"],
        "margin": 0.02,
        "probe": {"r": 8, "lora_alpha": 16},
        "directory": "bench/",
        "steps": 10,
        "learning_rate": 2e-4,  # which YAML reads as text
        "options": LoadOptions(),
    }


def test_tasks_with_arguments_and_options_of_the_model(write, tmp_path):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": 0}))
    more = f"""
tasks:
  - test.jsonl
  - {{loss: other.jsonl, length: 64, margin: 5e-2, columns: {{text: body}}}}
  - {{choices: {tmp_path / "questions.jsonl"}, metric: acc_norm, limit: 10}}
  - {{lm_eval: arc_easy, num_fewshot: 2}}
dtype: bfloat16
device: cpu
gate: 1e-1
"""
    found = read_bench_file(write(GOOD.replace("tasks: test.jsonl", "") + more))
    path, loss, choices, named = found["tasks"]
    assert path == "test.jsonl"
    assert (loss.source, loss.length, loss.margin, loss.options) == (
        "other.jsonl",
        64,
        0.05,
        {"columns": {"text": "body"}},
    )
    assert (choices.metric, choices.limit) == ("acc_norm", 10)
    assert (named.name, named.num_fewshot) == ("arc_easy", 2)
    assert found["options"] == LoadOptions(dtype="bfloat16", device="cpu")
    assert found["gate"] == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "stepz: 3", r"the key 'stepz' is not known; did you mean 'steps'\?"),
        (GOOD + "xyz: 3", "the key 'xyz' is not known; known are base, train"),
        (GOOD + "steps: 3", "the key 'steps' is there twice"),
        (GOOD.replace("steps: 10", ""), "the key 'steps' is needed"),
        (GOOD.replace("{r: 8, lora_alpha: 16}", "{r: 8, alpha: 16}"), "the key 'probe.alpha' is not known; did you"),
        (GOOD.replace("{r: 8, lora_alpha: 16}", "64"), "`probe` must be a mapping of LoraConfig's fields; got 64"),
        (GOOD.replace("train.jsonl", "{source: x, lenght: 3}"), r"'train.lenght' is not known; did you mean 'length'"),
        (GOOD.replace("test.jsonl", "[{los: test.jsonl}]"), r"`tasks\[0\]` must have one of the keys loss, choices"),
        (GOOD.replace("test.jsonl", "[{loss: x, limit: 3}]"), r"the key 'tasks\[0\].limit' is not known"),
        (GOOD.replace("test.jsonl", "[3]"), r"`tasks\[0\]` must be a path, or a mapping"),
        (GOOD.replace("test.jsonl", "[{choices: no.jsonl}]"), r"`tasks\[0\]`: The task's file 'no.jsonl' is not there"),
        (
            GOOD.replace("test.jsonl", "[{loss: x, margin: -1}]"),
            r"`tasks\[0\]`: `margin` must be a finite number above",
        ),
        (GOOD + "dtype: float3", '`dtype` must be "auto" or a dtype of torch'),
        ("- base", "must have a mapping of keys to values; got list"),
        ("a: [", "is not YAML: "),
        ("", "must have a mapping of keys to values; got NoneType"),
        (GOOD + "executor: 3", "the key 'executor' is not known"),
        (GOOD + "gate: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(write, text, message):
    path = write(text)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_bench_file(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        read_bench_file("no.yaml")


def test_the_page_documents_every_key():
    from lorakit.experiments._bench_file import _TASKS
    from lorakit.experiments._bench_settings import POLICIES, PROBE_FIELDS

    text = PAGE.read_text()
    keys = [
        name
        for name in inspect.signature(experiments.bench).parameters
        if name not in ("options", "executor", "shard", "progress")
    ]
    keys += [*inspect.signature(LoadOptions).parameters, *PROBE_FIELDS, *POLICIES, *_TASKS]
    assert [key for key in keys if f"`{key}`" not in text] == []
