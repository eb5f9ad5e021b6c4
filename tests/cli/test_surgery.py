"""`lorakit surgery --refine`, `--objective restore` and `--study` in a shell."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from shell import run

from lorakit import evaluation
from lorakit.surgery import refine, study


@pytest.fixture
def files(tiny_llama, randomize, base_model, tmp_path):
    """base/, adapter/, and texts to calibrate on, to be judged by and to guard."""
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"])
    model = randomize(get_peft_model(tiny_llama(), config), std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base_model)
    model.save_pretrained(tmp_path / "adapter")
    for name, first in (("calib", 0), ("own", 20), ("other", 40)):
        rows = [{"text": f"w{i} w{(7 * i) % 60} w{(3 * i) % 60} w{i % 5}"} for i in range(first, first + 16)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments(files, *more):
    return ("surgery", "--base", files / "base", "--adapter", files / "adapter", *more)


@pytest.mark.slow
def test_a_study_in_a_shell_is_that_of_python_and_goes_on(files):
    sets = ("--module-set", "residual=default", "--module-set", "attention=q_proj,o_proj")
    asked = (
        "--study",
        "--data",
        files / "calib.jsonl",
        "--task",
        files / "own.jsonl",
        "--guard",
        files / "other.jsonl",
    )
    asked += ("--policies", "smooth_abs, grad_direction", "--sizes", "4,8", "--seeds", "0,1")
    pages = ("--html", files / "study.html", "--plots", files / "plots")
    done = run(*arguments(files, *asked, *sets, *pages, "--records", files / "records", "--json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = evaluation.load_adapted(files / "base", files / "adapter")
    expected = study(
        model,
        str(files / "calib.jsonl"),
        task=str(files / "own.jsonl"),
        guards=[str(files / "other.jsonl")],
        policies=["smooth_abs", "grad_direction"],
        sizes=(4, 8),
        seeds=(0, 1),
        module_sets={"residual": None, "attention": ["q_proj", "o_proj"]},
        tokenizer=files / "base",
        progress=False,
    )
    assert len(found["edits"]) == 2 * 2 * 2 * 2
    assert [row["gain"] for row in found["edits"]] == pytest.approx([e.gain for e in expected.edits], abs=1e-6)
    assert len(found["controls"]) == 20 * 2
    assert "Policies" in (files / "study.html").read_text()
    assert list((files / "plots").iterdir())
    again = run(*arguments(files, *asked, *sets, "--records", files / "records", "--json"))
    assert json.loads(again.stdout)["edits"] == found["edits"]
    assert json.loads(again.stdout)["seconds"] == 0
    table = run(*arguments(files, *asked, *sets, "--records", files / "records"))
    assert (table.returncode, "random controls" in table.stdout) == (0, True)


def test_restoring_in_a_shell(files):
    asked = ("--refine", "--objective", "restore", "--task", files / "own.jsonl", "--base-text", files / "other.jsonl")
    more = ("--modules", "all-linear", "--margin", "50", "--scales", "0.5,0", "--html", files / "restore.html")
    done = run(*arguments(files, "--out", files / "out", *asked, *more, "--json"))
    found = json.loads(done.stdout)
    assert done.returncode == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[found["verdict"]]
    assert found["kept"] == (files / "out").exists() == (done.returncode == 0)
    assert [point["scale"] for point in found["frontier"]] == [0.5, 0]
    report = refine(
        files / "adapter",
        None,
        base=files / "base",
        objective="restore",
        task=str(files / "own.jsonl"),
        base_text=evaluation.loss(files / "other.jsonl"),
        target_modules="all-linear",
        margin=50,
        scales=(0.5, 0),
        progress=False,
    )
    assert (found["verdict"], found["p_value"]) == (report.verdict, report.p_value)
    assert found["frontier"][0]["base_text"]["difference"] == pytest.approx(report.frontier[0].base_text.difference)
    assert "rule:" in run(*arguments(files, "--out", files / "out", *asked, *more)).stdout
    assert (files / "restore.html").exists()


def test_refining_in_a_shell_tries_the_policies_that_are_named(files):
    asked = ("--refine", "--data", files / "calib.jsonl", "--task", files / "own.jsonl", "--num-examples", "6")
    asked += ("--num-selection", "6", "--policies", "grad_direction,robust_z", "--out", files / "out")
    done = run(*arguments(files, *asked, "--json"))
    found = json.loads(done.stdout)
    assert {one["policy"] for one in found["candidates"]} == {"grad_direction", "robust_z"}
    assert done.returncode == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[found["verdict"]]
    assert found["kept"] == (files / "out").exists()


DATA, TASK, OUT = ("--data", "d"), ("--task", "t"), ("--out", "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*DATA,), "--out"),
        ((*OUT,), "--data"),
        ((*DATA, *OUT, "--refine"), "--task"),
        ((*DATA, *TASK, "--refine"), "--out"),
        ((*DATA, "--study"), "--task"),
        ((*TASK, "--study"), "--data"),
        ((*TASK, *OUT, "--refine", "--objective", "restore"), "--base-text"),
        ((*DATA, *TASK, *TASK, "--study"), "must be given once with --study"),
        ((*DATA, *TASK, "--study", "--refine"), "do not go together"),
        ((*DATA, *TASK, *OUT, "--study"), "does nothing with --study"),
        ((*DATA, *TASK, "--study", "--policy", "z_score"), "does nothing with --study"),
        ((*DATA, *TASK, *OUT, "--refine", "--policy", "z_score"), "does nothing with --refine"),
        ((*DATA, *TASK, *OUT, "--refine", "--sizes", "3"), "does nothing with --refine"),
        ((*DATA, *OUT, "--sizes", "3"), "does nothing without --study"),
        ((*DATA, *OUT, "--objective", "restore"), "does nothing without --refine or --refine --objective restore"),
        ((*DATA, *TASK, "--study", "--sizes", "many"), "must be whole numbers"),
        ((*DATA, *TASK, "--study", "--module-set", "all"), "must be NAME=MODULES"),
    ],
)
def test_options_that_are_missing_or_would_do_nothing(options, message):
    done = run("surgery", "--base", "b", "--adapter", "a", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.replace("│", " ").split())
