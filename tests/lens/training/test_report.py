"""A training in one page: what its file holds, trends by a stated rule, and advice that follows from them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.lens import Trajectory, training_report, write_html
from lorakit.lens.training.report import trend


def line(step, *, cu, kappa=None, chance=None):
    total = {"name": "all", "modules": 2, "effective_rank": 1.0, "stable_rank": 1.0, "capacity_utilization": cu}
    total |= {"kappa": kappa, "kappa_chance": chance}
    return {"step": step, "modules": [], "roles": [], "total": total, "qv_gap": None, "unmeasured": []}


def write(path, *, losses=(), evaluations=(), cus=(0.5,), kappa=None, chance=None, config=True, end=""):
    """A run measured every 10 steps, with a loss and an evaluation at as many."""
    lines = (
        [{"config": {"adapter": {"peft_type": "LORA", "r": 8}, "trainer": {"learning_rate": 1e-3}}}] if config else []
    )
    lines += [line(10 * i, cu=cu, kappa=kappa, chance=chance) for i, cu in enumerate(cus)]
    lines += [{"step": 10 * i, "log": {"loss": loss, "grad_norm": 1.0}} for i, loss in enumerate(losses)]
    lines += [{"step": 10 * i, "log": {"eval_loss": loss}} for i, loss in enumerate(evaluations)]
    path.mkdir(exist_ok=True)
    (path / "spectra.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + end)
    return path


FALLING = [4.0 - 0.1 * i for i in range(20)]


def test_a_loss_that_still_falls_says_train_longer(tmp_path):
    report = training_report(write(tmp_path / "run", losses=FALLING))
    (run,) = report.runs
    assert run.trends["loss"] == "falling"
    assert any("train longer" in one for one in run.advice)
    assert (run.method, run.rank, run.learning_rate, run.steps) == ("LORA", 8, 1e-3, 190)
    assert run.loss == pytest.approx(np.mean(FALLING[-2:]))
    assert run.first_loss == 4.0
    assert run.grad_norm == 1.0
    assert "loss falling" in str(report)


def test_an_evaluation_that_rises_says_where_to_stop(tmp_path):
    evaluations = [3.0, 2.0, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
    (run,) = training_report(write(tmp_path / "run", losses=FALLING, evaluations=evaluations)).runs
    assert (run.best_eval_step, run.best_eval_loss, run.eval_loss) == (20, 1.0, 2.0)
    assert any("lowest at step 20" in one for one in run.advice)
    assert not any("train longer" in one for one in run.advice)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cus": [0.9] * 5}, "twice the rank"),
        ({"cus": [0.3] * 5}, "half the rank"),
        ({"cus": [0.1, 0.2, 0.25, 0.3, 0.35]}, None),
        ({"cus": [0.6] * 5}, None),
        ({"kappa": 0.011, "chance": 0.01}, "κ is near chance"),
        ({"kappa": 0.5, "chance": 0.01}, None),
    ],
)
def test_advice_of_spectra(tmp_path, options, words):
    (run,) = training_report(write(tmp_path / "run", **options)).runs
    assert [one for one in run.advice if words and words in one] if words else run.advice == ()


def test_several_runs_are_compared(tmp_path):
    a, b = (
        write(tmp_path / name, losses=FALLING, evaluations=[2.0, end]) for name, end in (("<b>one", 1.5), ("two", 1.2))
    )
    report = training_report(a, b)
    assert "lowest evaluation loss" in report.headline
    assert report.headline.endswith(f"of {b}")
    assert [row["path"] for row in report.rows()] == [str(a), str(b)]
    assert len(report.tables()[0].rows) == 2
    assert set(report.figures()) == {"training", "spectra_1", "spectra_2"}
    json.dumps(report.to_dict(), allow_nan=False)
    write_html(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;one" in page
    assert "<b>one" not in page


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path):
    path = write(tmp_path / "run", losses=FALLING[:5], end='{"step": 50, "lo')
    report = training_report(path)
    assert report.runs[0].cut_off
    assert "cut off" in str(report)
    assert report.trajectories[0].logs[-1].step == 40


def test_files_of_older_versions_have_snapshots_only(tmp_path):
    report = training_report(write(tmp_path / "run", config=False, cus=[0.5, 0.6]))
    assert report.runs[0].loss is None
    assert report.runs[0].trends == {}
    assert report.plot().axes


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one training"):
        training_report()
    with pytest.raises(FileNotFoundError):
        training_report(tmp_path)
    with pytest.raises(ValueError, match="has no measurement"):
        training_report(write(tmp_path / "empty", cus=()))
    broken = write(tmp_path / "broken", losses=FALLING)
    text = (broken / "spectra.jsonl").read_text()
    (broken / "spectra.jsonl").write_text('{"step": 3, "log": 5}\n' + text)
    with pytest.raises(ValueError, match="line 1"):
        training_report(broken)


def test_steps_that_were_trained_twice_count_as_they_were_last(tmp_path):
    path = write(tmp_path / "run", losses=[4.0, 3.0])
    with (path / "spectra.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "log": {"loss": 2.5}}) + "\n")
        file.write(json.dumps(line(0, cu=0.7)) + "\n")
    found = Trajectory.read(path)
    assert [(one.step, one.values["loss"]) for one in found.logs] == [(0, 4.0), (10, 2.5)]
    assert [one.total.capacity_utilization for one in found.snapshots] == [0.7]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "5", '{"step": 1}', '{"log": {}}', '{"config": 3}', '{"step": {}, "log": {}}', "null", '"x"'],
)
def test_hostile_lines_are_errors_that_name_the_line(tmp_path, text):
    path = write(tmp_path / "run", losses=FALLING)
    file = path / "spectra.jsonl"
    file.write_text(text + "\n" + file.read_text())
    with pytest.raises(ValueError, match=r"spectra\.jsonl, line 1: "):
        training_report(path)


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 60), st.floats(0.01, 5), st.integers(0, 999))
def test_trends_of_a_line_and_of_its_mirror(count, slope, seed):
    noise = 1e-3 * slope * np.random.default_rng(seed).standard_normal(count)
    values = slope * np.arange(count) + noise
    assert trend(list(values)) == "rising"
    assert trend(list(-values)) == "falling"
    assert trend([1.0] * count) == "level"
    assert trend(list(values[:3])) is None


def test_the_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lorakit.cli.app import app

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write(tmp_path / name, losses=FALLING)
    done = CliRunner().invoke(app, ["report", "a", "b", "--html", "page.html", "--json"])
    assert done.exit_code == 0, done.output
    assert [run["path"] for run in json.loads(done.stdout)["runs"]] == ["a", "b"]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
