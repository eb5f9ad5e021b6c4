"""The examples that `probe` and `surgery` are given in a shell: which, of which columns, by whose template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chats import said
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lorakit.cli.app import app
from lorakit.data import loader

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def run(*arguments: Any) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def adapter(tiny_llama, randomize, tmp_path):
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    randomize(get_peft_model(tiny_llama(), config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_probe_takes_the_rows_that_a_loader_does(base_model, tmp_path):
    rows = [{"q": f"w{i}", "a": " w1 w2 w3" if i % 2 else " w4 w5"} for i in range(12)]
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    options = {"start": 3, "num_examples": 5, "shuffle_seed": 4, "length": 3, "batch_size": 2}
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    columns = ("--columns", "prompt=q, completion=a")
    done = run("probe", base_model, tmp_path / "a.csv", *flags, *columns, "--json")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    expected = loader(tmp_path / "a.csv", tokenizer, **options, columns={"prompt": "q", "completion": "a"})
    found = json.loads(done.stdout)
    assert found["data"] == expected.report.to_dict()
    assert found["data"]["num_prompts_cut"] > 0
    assert found["report"]["num_examples"] == 5
    done = run("probe", base_model, tmp_path / "a.csv", *flags, *columns)
    assert f"data: {expected.report.headline}" in done.stdout
    assert all(line in done.stdout for line in expected.report.details)


@pytest.mark.slow
def test_surgery_reads_chats_by_the_template_beside_the_adapter(base_model, adapter, tmp_path):
    data, out = tmp_path / "chat.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"messages": said("w1 w2", f"w{i}")}) for i in range(3, 8)))
    arguments = ("surgery", "--base", base_model, "--adapter", adapter, "--data", data, "--out", out, "--start", 1)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2
    assert "the tokenizer has no chat template" in " ".join(done.output.split())
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    report = json.loads(run(*arguments, "--json").stdout)
    assert (report["data"]["num_read"], report["data"]["num_rows"], report["data"]["num_tokens"]) == (4, 5, 4 * 5)
    done = run(*arguments)
    assert "Data: 4 examples from 4 of 5 rows" in " ".join(done.stdout.split())
