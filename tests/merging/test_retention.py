"""What merges keep of each adapter's task, against scores computed one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shell import run

from lorakit import evaluation
from lorakit.adapters import open_adapter
from lorakit.errors import EvaluationError
from lorakit.evaluation import loss, paired_interval
from lorakit.merging import _retention, merge

pytestmark = pytest.mark.slow


@pytest.fixture
def files(tiny_llama, randomize, base_model, tmp_path):
    """base/, the adapters a/ and b/, and the texts first.jsonl and second.jsonl."""
    for name, seed in (("a", 3), ("b", 4)):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"])
        model = randomize(get_peft_model(tiny_llama(), config), seed=seed)
        model.peft_config["default"].base_model_name_or_path = str(base_model)
        model.save_pretrained(tmp_path / name)
    for name, first in (("first", 0), ("second", 20)):
        rows = [{"text": f"w{i} w{(7 * i) % 60} w{(3 * i) % 60} w{i % 5}"} for i in range(first, first + 12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def scores(files, adapter, task):
    base = evaluation.load_base(files / "base")
    options = {"tokenizer": evaluation._models.load_tokenizer(files / "base"), "progress": False}
    if adapter is None:
        return evaluation.evaluate(base, task, **options)[task.name].scores
    return evaluation.evaluate(PeftModel.from_pretrained(base, adapter).eval(), task, **options)[task.name].scores


def norms(path):
    view = open_adapter(path)
    with view.source.reader() as read:
        return {m.name: float(torch.linalg.matrix_norm(m.update(read).dense().double())) for m in view.modules}


def test_retention_is_that_of_scores_computed_one_by_one(files):
    adapters = [files / "a", files / "b"]
    tasks = {files / "a": loss(files / "first.jsonl"), str(files / "b"): loss(files / "second.jsonl")}
    report = merge(adapters, files / "out", base=files / "base", tasks=tasks, weights=(0.8, 0.6), progress=False)
    assert report.path == str(files / "out")
    assert [(row.task, row.n) for row in report.retention] == [("first", 12), ("second", 12)]
    _retention.write_random(files / "out", files / "random", 0)
    for row, adapter, task in zip(report.retention, adapters, tasks.values(), strict=True):
        base, single, merged, random = (
            scores(files, one, task) for one in (None, adapter, files / "out", files / "random")
        )
        means = [np.mean(one) for one in (base, single, merged, random)]
        assert [row.base, row.single, row.merged, row.random] == pytest.approx(means, abs=1e-5)
        for found, reference, candidate in (
            (row.gain, base, single),
            (row.against_adapter, single, merged),
            (row.against_base, base, merged),
            (row.against_random, random, merged),
        ):
            interval = paired_interval(reference, candidate)
            expected = (interval.difference, interval.lower, interval.upper)
            assert (found.difference, found.lower, found.upper) == pytest.approx(expected, abs=1e-5)
        shown = row.gain.lower > 0
        assert row.retention == (pytest.approx((means[2] - means[0]) / (means[1] - means[0])) if shown else None)
    assert json.dumps(report.to_dict(), allow_nan=False)
    assert report.details[0] == report.retention[0].line


def test_the_random_adapter_has_the_merges_norms_and_nothing_else_of_it(files):
    merge([files / "a", files / "b"], files / "out")
    _retention.write_random(files / "out", files / "random", 0)
    _retention.write_random(files / "out", files / "again", 0)
    assert norms(files / "random") == pytest.approx(norms(files / "out"), rel=1e-5)
    view, other = open_adapter(files / "out"), open_adapter(files / "random")
    with view.source.reader() as read, other.source.reader() as read_other:
        for mine, theirs in zip(view.modules, other.modules, strict=True):
            assert abs(float(mine.update(read).cosine(theirs.update(read_other)))) < 0.5
    same = (files / "random" / "adapter_model.safetensors").read_bytes()
    assert (files / "again" / "adapter_model.safetensors").read_bytes() == same


def test_what_goes_wrong_leaves_out_as_it_was(files):
    adapters = [str(files / "a"), str(files / "b")]
    merge(adapters, files / "out", rank=2)
    before = {path.name: path.read_bytes() for path in (files / "out").iterdir()}
    unknown = {files / "c": loss(files / "first.jsonl")}
    mine = {adapters[0]: loss(files / "first.jsonl")}
    broken = {adapters[0]: evaluation.function(lambda model: [float("nan")], name="broken")}
    for tasks, options, error, message in (
        (mine, {}, TypeError, "`tasks` needs `base`"),
        ({}, {"base": files / "base"}, TypeError, "`tasks` must be a mapping"),
        (unknown, {"base": files / "base"}, ValueError, "which is not merged here"),
        (mine, {"base": files / "base", "alpha": 0.5}, ValueError, "`alpha`"),
        (broken, {"base": files / "base"}, EvaluationError, "finite"),
    ):
        with pytest.raises(error, match=message):
            merge(adapters, files / "out", tasks=tasks, progress=False, **options)
    assert {path.name: path.read_bytes() for path in (files / "out").iterdir()} == before


def test_in_a_shell(files):
    command = ("merge", files / "a", files / "b", files / "out", "--base", files / "base")
    retain = (
        "--retain",
        f"{files / 'a'}={files / 'first.jsonl'}",
        "--retain",
        f"{files / 'b'}={files / 'second.jsonl'}",
    )
    done = run(*command, *retain, "--limit", "6", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["summary"]["retention"]
    assert [(row["task"], row["n"]) for row in found] == [("first", 6), ("second", 6)]
    assert (files / "out" / "adapter_model.safetensors").exists()
    for more, message in (
        (("--retain", "nothing"), "must be ADAPTER=TASK"),
        ((*retain, "--margin", "1"), "does not go with --retain"),
    ):
        done = run(*command, *more)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
    done = run("merge", files / "a", files / "b", files / "other", *retain)
    assert (done.returncode, (files / "other").exists()) == (2, False)
