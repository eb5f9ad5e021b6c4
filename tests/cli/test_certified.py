"""--task on the commands that write an adapter: before and after, the verdict as exit code, and idle options refused."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from shell import run

from lorakit import evaluation
from lorakit.adapters.edit_log import read_edits

COMMANDS = ("compress", "merge", "export", "surgery")


@pytest.fixture
def files(tiny_llama, randomize, base_model, tmp_path):
    """base/, adapter/, texts.jsonl to score and calib.jsonl to calibrate on."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"])
    model = randomize(get_peft_model(tiny_llama(), config))
    model.peft_config["default"].base_model_name_or_path = str(base_model)
    model.save_pretrained(tmp_path / "adapter")
    for name, first in (("texts", 0), ("calib", 20)):
        rows = [{"text": f"w{i} w{(7 * i) % 60} w{(3 * i) % 60} w{i % 5}"} for i in range(first, first + 20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def command(files, name, *more):
    adapter, out = files / "adapter", files / "out"
    start = {
        "compress": ("compress", adapter, out, "--max-rank", "2"),
        "merge": ("merge", adapter, adapter, out, "--rank", "2"),
        "export": ("export", adapter, out, "--rank", "2"),
        "surgery": ("surgery", "--adapter", adapter, "--data", files / "calib.jsonl", "--out", out),
    }[name]
    return run(*start, *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_before_and_after_and_the_verdict_as_exit_code(files, name):
    task = ("--base", files / "base", "--task", files / "texts.jsonl")
    done = command(files, name, *task, "--margin", "50")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert f"PASS: {files / 'out'} against {files / 'adapter'}, texts" in text
    assert "Before and after: texts: PASS, -" in text
    certificate = evaluation.read_certificate(files / "out")
    certificate.verify()
    certificate.check_candidate(files / "out")
    assert "Did the task survive?" in (files / "out" / "README.md").read_text()
    assert len(read_edits(files / "out")) == (name == "surgery")
    done = command(files, name, *task, "--margin", "1e-9", "--alpha", "0.1", "--limit", "6", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == {"FAIL": 1, "INCONCLUSIVE": 3, "PASS": 0}[found["certificate"]["verdict"]]
    assert (found["certificate"]["alpha"], found["certificate"]["tasks"][0]["n"]) == (0.1, 6)
    assert evaluation.read_certificate(files / "out").sha256 == found["certificate"]["sha256"]
    assert run("certify", "--verify", files / "out").returncode == 0


@pytest.mark.slow
def test_surgery_refuses_to_certify_on_its_calibration_documents(files):
    task = ("--base", files / "base", "--task", files / "calib.jsonl", "--margin", "1")
    done = command(files, "surgery", *task)
    assert done.returncode == 2
    assert "20 documents of task 'calib' were used for calibration or selection" in done.stderr
    assert not (files / "out").exists()


@pytest.mark.slow
def test_export_of_the_smallest(files):
    task = ("--base", files / "base", "--task", files / "texts.jsonl", "--margin")
    done = run("export", files / "adapter", files / "out", "--rank", "smallest", *task, "50", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 1
    done = run("export", files / "adapter", files / "none", "--rank", "smallest", *task, "1e-9", "--limit", "3")
    assert done.returncode in (1, 3), done.stderr
    assert "Nothing is written" in done.stdout
    assert not (files / "none").exists()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--margin", "0.1"), "--margin: does nothing without --task"),
        (("--alpha", "0.1", "--limit", "3"), "--alpha, --limit: does nothing without --task"),
        (("--guard", "t", "--cache", "c"), "--guard, --cache: does nothing without --task"),
        (("--task", "t"), "--margin: is needed with --task"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, name, more, message):
    base = () if name in ("compress", "merge") and "--task" not in more else ("--base", "b")
    done = command(tmp_path, name, *more, *base)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.replace("│", " ").split()).replace("Invalid value for ", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "a", "out", "--max-rank", "2", "--dtype", "float16"), "--dtype: does nothing without --task"),
        (("compress", "a", "out", "--smallest", "--base", "b"), "--task, --margin: is needed with --smallest"),
        (("merge", "a", "b", "out", "--load-in-4bit"), "--load-in-4bit: does nothing without --task"),
        (("merge", "a", "b", "out", "--task", "t", "--margin", "1"), "--base: is needed with --task"),
        (("export", "a", "out", "--device", "cpu"), "--device: does nothing without --base"),
        (("export", "a", "out", "--rank", "smallest"), "--base, --task, --margin: is needed with --rank smallest"),
        (("export", "a", "out", "--format", "mlx", "--revision", "x"), "--revision: does nothing without --task"),
        (("export", "a", "out", "--format", "mlx", "--task", "t"), "takes no --rank, --compact, --for or --task"),
    ],
)
def test_other_options_that_are_refused(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.replace("│", " ").split()).replace("Invalid value for ", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("certify", "a", "b"), "--base, --task, --margin: is needed"),
        (
            ("evaluate", "a", "--base", "nowhere/x", "--task", "t", "--dtype", "f7"),
            "`dtype` must be",
        ),
        (("agree", "a"), "Missing argument"),
        (("certify", "--verify", "nowhere.json"), "is not a certificate of lorakit's"),
        (("compress", "nowhere/x/y", "out", "--max-rank", "2"), "neither a directory nor a file"),
        (("certify", "--nothing"), "No such option: --nothing"),
    ],
)
def test_errors_leave_stdout_empty_where_json_is_asked_for(arguments, message):
    done = run(*arguments, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.replace("│", " ").split())
