"""The demo's path, end to end, on a tiny model."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lorakit import demo, evaluation
from lorakit.cli.app import app
from lorakit.demo import _stages
from lorakit.demo._run import run_demo
from lorakit.demo._stages import COMPRESSED, DIRECTORIES, RANDOM, SURGERY
from lorakit.demo._training import FISHERLORA, LORA, OTHER_SEED, SPECLORA
from lorakit.errors import EvaluationError

pytestmark = pytest.mark.slow
FILES = [OTHER_SEED, COMPRESSED, SURGERY, RANDOM, FISHERLORA, SPECLORA]


def rows_of(report):
    return {row.method: row for row in report.methods}


def losses(model, settings):
    """Each held-out document's mean loss, from its own forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    found = []
    for line in (Path(settings.out) / "held-out.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][: settings.document_length]])
        with torch.no_grad():
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return numpy.array(found)


def test_the_table_has_every_method_with_its_parameters(outcome):
    rows = rows_of(outcome.report)
    assert list(rows) == ["no adapter", LORA, *FILES]
    widths = {"q": 32 + 32, "v": 32 + 16, "o": 32 + 32, "down": 48 + 32}
    ranks = {LORA: (16, 0), OTHER_SEED: (16, 0), FISHERLORA: (4, 0), SPECLORA: (16, 1)}
    for method, (q, masked) in ranks.items():
        mask = masked * (32 + 16 + 32 + 32)  # k = 200 is clipped to the smaller side of each weight
        others = 16 * (widths["v"] + widths["o"] + widths["down"])
        assert rows[method].parameters == 2 * (q * widths["q"] + others + mask)
        assert len(rows[method].training_loss) == 8
        assert rows[method].training_loss[-1] < rows[method].training_loss[0]
        assert 0 < rows[method].utilization_q <= 1
    compressed = rows[COMPRESSED]
    assert compressed.file_rank == outcome.report.recommended_rank <= 16
    assert compressed.parameters == 2 * compressed.file_rank * sum(widths.values())
    assert rows[SPECLORA].file_rank == 32


@pytest.fixture(scope="module")
def reference(outcome):
    base = AutoModelForCausalLM.from_pretrained(outcome.settings.model)
    return losses(PeftModel.from_pretrained(base, outcome.out / "lora"), outcome.settings)


@pytest.mark.parametrize("method", ["no adapter", LORA, *FILES])
def test_losses_and_verdicts_are_those_of_the_files(outcome, reference, method):
    row = rows_of(outcome.report)[method]
    base = AutoModelForCausalLM.from_pretrained(outcome.settings.model)
    model = base if row.directory is None else PeftModel.from_pretrained(base, outcome.out / row.directory)
    own = losses(model, outcome.settings)
    assert row.loss == pytest.approx(own.mean(), abs=1e-5)
    if method == LORA:
        assert (row.against_lora, row.verdict) == (None, None)
        return
    differences = own - reference
    reach = stats.t.ppf(0.95, len(own) - 1) * stats.sem(differences)
    assert row.against_lora == pytest.approx(differences.mean(), abs=1e-5)
    assert (row.lower, row.upper) == pytest.approx((differences.mean() - reach, differences.mean() + reach), abs=1e-5)
    margin = outcome.settings.margin
    assert row.verdict == ("PASS" if row.upper < margin else "FAIL" if row.lower > margin else "INCONCLUSIVE")


def test_the_control_fails_and_the_compressed_adapter_passes(outcome):
    rows = rows_of(outcome.report)
    assert rows["no adapter"].verdict == "FAIL"
    assert rows[COMPRESSED].verdict == "PASS"
    assert "The model without an adapter, as a control: FAIL." in outcome.report.details


def test_every_file_computes_what_was_trained(outcome):
    rows = rows_of(outcome.report)
    assert rows[COMPRESSED].file_error is None
    for method in {LORA, *FILES} - {COMPRESSED}:
        assert 0 <= rows[method].file_error <= 1e-5
    assert outcome.report.findings == ()


def test_certificates_verify_and_name_the_files_where_they_lie(outcome):
    rows = rows_of(outcome.report)
    for method in FILES:
        certificate = evaluation.read_certificate(outcome.out / "certificates" / f"{DIRECTORIES[method]}.json")
        certificate.verify()
        assert certificate.reference == (str(outcome.out / "lora"),)
        assert certificate.candidate == (str(outcome.out / DIRECTORIES[method]),)
        assert (certificate.verdict, certificate.margin) == (rows[method].verdict, 0.02)
        assert certificate.difference == -rows[method].against_lora


def test_nothing_names_the_directory_that_it_was_written_in(outcome):
    written = [path for path in outcome.out.rglob("*") if path.is_file()]
    assert {path.name for path in outcome.out.parent.iterdir()} == {"model", "out"}
    assert not [path for path in written if b"/.out." in path.read_bytes()]


def test_each_stage_is_a_line(outcome):
    stages = [line.split()[0] for line in outcome.lines]
    expected = ["lorakit", "data", "train", "audit", "compress", "surgery", "surgery"]
    assert stages == [*expected, "train", "train", "export", "train", "export", "certify", "page"]
    assert "margin, fixed now: 0.02 nats a token" in outcome.lines[0]
    assert not [line for line in outcome.lines if "\n" in line]


def test_the_page_has_all_stages_and_loads_nothing(outcome):
    page = (outcome.out / "demo.html").read_text()
    for title in ("Audit", "Compression", "Surgery", "Certificates", "Next steps"):
        assert re.search(f"<h2>[^<]*{title}", page), title
    pictures = re.findall(r'<img alt="(\w+)" src="([^"]{22})', page)
    assert {source for _, source in pictures} == {"data:image/png;base64,"}
    names = [name for name, _ in pictures]
    assert names[:5] == ["verdicts", "training", "heatmaps", "spectra", "energy"]
    for row in outcome.report.methods:
        assert f"<td>{row.method}</td>" in page
    for method in FILES:
        certificate = evaluation.read_certificate(outcome.out / "certificates" / f"{DIRECTORIES[method]}.json")
        assert certificate.sha256[:16] in page
    assert not re.search(r"<script|url\(|https?://", page)


def test_results_are_the_report(outcome):
    results = json.loads((outcome.out / "results.json").read_text())
    assert results == outcome.report.to_dict()
    assert results["settings"]["margin"] == 0.02
    assert [row["method"] for row in outcome.report.rows()] == ["no adapter", LORA, *FILES]


def test_the_next_steps_run_and_certify_alike(outcome, monkeypatch):
    commands = [step for step in outcome.report.next_steps if not step.startswith("#")]
    assert [command.split()[1] for command in commands] == ["audit", "compress", "certify", "servable"]
    row = rows_of(outcome.report)[COMPRESSED]
    for command in commands:
        arguments = shlex.split(command)[1:]
        done = CliRunner().invoke(app, [*arguments, "--json"])
        if arguments[0] != "certify":
            assert done.exit_code == 0, done.output
            continue
        found = json.loads(done.stdout)
        assert done.exit_code == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[row.verdict]
        assert found["difference"] == pytest.approx(-row.against_lora, abs=1e-4)
    last = outcome.report.next_steps[-1]
    assert "held-out.jsonl" in last
    assert "not seen" in last


@pytest.fixture
def no_page(monkeypatch):
    """Leaves the page out, whose pictures take most of the time."""
    monkeypatch.setattr("lorakit.demo._run.write_html", lambda report, path, sections: None)


def test_a_damaged_export_fails_and_is_an_error(settings, tmp_path, monkeypatch, no_page):
    to_lora = _stages.export.to_lora

    def damaged(model, out):
        """What is written has no update: a server would serve the base model."""
        report = to_lora(model, out)
        tensors = load_file(out / "adapter_model.safetensors")
        for name in [name for name in tensors if "lora_B" in name]:
            tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, out / "adapter_model.safetensors")
        return report

    monkeypatch.setattr(_stages.export, "to_lora", damaged)
    report = run_demo(replace(settings, out=str(tmp_path / "out")), lambda line: None)
    rows = rows_of(report)
    for method in (FISHERLORA, SPECLORA):
        assert rows[method].verdict == "FAIL"
        assert rows[method].file_error > 1e-3
    assert rows[COMPRESSED].verdict == "PASS"
    assert [finding.code for finding in report.findings] == ["file_differs"] * 2
    assert report.has_errors
    monkeypatch.setattr(demo, "run_demo", lambda settings, say: report)
    assert CliRunner().invoke(app, ["demo", "--json"]).exit_code == 1


def test_an_interrupted_run_leaves_what_was_there(settings, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("old")

    def interrupt(line):
        if line.startswith("compress"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(replace(settings, out=str(out)), interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert (out / "results.json").read_text() == "old"


def test_documents_that_surgery_has_seen_are_refused(settings, tmp_path, monkeypatch):
    parts = demo.split_documents()
    monkeypatch.setattr("lorakit.demo._data.split_documents", lambda seed: parts | {"held_out": parts["calibration"]})
    with pytest.raises(EvaluationError, match="6 documents of task 'held-out' were used for calibration"):
        run_demo(replace(settings, out=str(tmp_path / "out"), steps=1), lambda line: None)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_json_alone_and_ends_with_0(model_directory, tmp_path, no_page):
    out = tmp_path / "out"
    arguments = ["demo", "--model", str(model_directory), "--out", str(out), "--steps", "2", "--batch-size", "2"]
    arguments += ["--length", "24", "--documents", "3", "--document-length", "32", "--margin", "1", "--seed", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results == json.loads((out / "results.json").read_text())
    assert results["documents"] == {"train": 4, "calibration": 3, "held_out": 3}
    assert {row["verdict"] for row in results["methods"]} == {"PASS", None}
    assert all(math.isfinite(row["loss"]) for row in results["methods"])
    assert "margin, fixed now: 1 nats a token" in " ".join(done.stderr.split())
