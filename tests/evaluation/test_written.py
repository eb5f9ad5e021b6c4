"""Adapters that are written with their certificate, and certificates that travel with them, or stay behind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import torch

from lorakit import evaluation
from lorakit.adapters.companions import without_certificate
from lorakit.compress import truncate
from lorakit.errors import EvaluationError, OverwriteError
from lorakit.evaluation._digests import digest
from lorakit.merging import merge

CERTIFICATE, CARD, WEIGHTS = "lorakit_certificate.json", "README.md", "adapter_model.safetensors"


def near(home, name):
    """A task: minus how far the model's logits are from those of an adapter, less 0.5: scores of 0 would be binary."""
    ids = torch.arange(1, 193).view(24, 8)
    with evaluation._attach.adapted(evaluation.load_base(home / "base"), home / name) as model, torch.no_grad():
        wanted = model(input_ids=ids).logits
    return evaluation.function(
        lambda model: -0.5 - (model(input_ids=ids).logits - wanted).abs().mean((1, 2)), name=f"near {name}"
    )


def compressed(home, out, rank=4, margin=0.01, task=None, **options):
    return evaluation.write_certified(
        lambda directory: truncate(home / "good", directory, max_rank=rank),
        out,
        base=home / "base",
        references=home / "good",
        tasks=task or near(home, "good"),
        margin=margin,
        progress=False,
        **options,
    )


def test_the_certificate_is_written_with_the_adapter(home, tmp_path):
    report, certificate = compressed(home, tmp_path / "out")
    assert (report.path, certificate.verdict) == (str(tmp_path / "out"), "PASS")
    assert certificate.candidate == (str(tmp_path / "out"),)
    assert evaluation.read_certificate(tmp_path / "out") == certificate
    certificate.check_candidate(tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert certificate.to_model_card() in card
    assert "* `compress` (" in card
    # A FAIL is written all the same, and replaces the other with everything of it.
    report, certificate = compressed(home, tmp_path / "out", rank=1)
    assert certificate.verdict == "FAIL"
    assert evaluation.read_certificate(tmp_path / "out") == certificate
    assert (tmp_path / "out" / CARD).read_text().count("Did the task survive?") == 1
    assert report.r == 1


def test_if_anything_fails_the_target_is_as_it_was(home, tmp_path, monkeypatch):
    compressed(home, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    broken = evaluation.function(lambda model: [float("nan")] * 3, name="broken")
    with pytest.raises(EvaluationError, match="not finite"):
        compressed(home, tmp_path / "out", rank=2, task=broken)

    def full(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluation.Certificate, "save", full)
    with pytest.raises(OSError, match="No space left"):
        compressed(home, tmp_path / "out", rank=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OverwriteError, match="the directory of the adapter itself"):
        compressed(home, home / "good")


def test_every_input_is_a_reference_of_a_merge(home, tmp_path):
    def write(directory):
        return merge([home / "good", home / "bad"], directory, weights=[1.0, 0.0])

    tasks = [near(home, "good"), near(home, "bad")]
    settings = {"base": home / "base", "tasks": tasks, "margin": 0.01, "progress": False}
    both = [home / "good", home / "bad"]
    _, certificate = evaluation.write_certified(write, tmp_path / "out", references=both, **settings)
    verdicts = {row.name: row.verdict for row in certificate.tasks}
    # With weights 1 and 0 the merge is good/: it keeps what good/ does, and loses what bad/ does.
    assert verdicts == {
        f"near good against {home / 'good'}": "PASS",
        f"near bad against {home / 'good'}": "PASS",
        f"near good against {home / 'bad'}": "PASS",
        f"near bad against {home / 'bad'}": "FAIL",
    }
    assert (certificate.verdict, certificate.headline_task) == ("FAIL", f"near bad against {home / 'bad'}")
    assert certificate.reference == (str(home / "good"), str(home / "bad"))
    evaluation.read_certificate(tmp_path / "out").verify()
    # An input that is there twice is one reference, and the same adapter elsewhere is another name for it.
    _, once = evaluation.write_certified(write, tmp_path / "out", references=[home / "good"] * 2, **settings)
    assert [row.name for row in once.tasks] == ["near good", "near bad"]


@pytest.mark.slow
def test_a_rewritten_adapter_leaves_the_certificate_of_its_source_behind(home, tmp_path):
    compressed(home, tmp_path / "certified")
    card = (tmp_path / "certified" / CARD).read_text()
    (tmp_path / "certified" / CARD).write_text(card + "\n## More\n\nAbout the data.\n")
    truncate(tmp_path / "certified", tmp_path / "cut", max_rank=2)
    merge([tmp_path / "certified"] * 2, tmp_path / "merged")
    truncate(tmp_path / "certified", tmp_path / "certified", max_rank=1, overwrite=True)
    for name in ("cut", "merged", "certified"):
        text = (tmp_path / name / CARD).read_text()
        assert "Did the task survive?" not in text
        assert "lorakit certificate" not in text
        assert "About the data." in text
        assert not (tmp_path / name / CERTIFICATE).exists()


def test_only_the_section_of_a_certificate_is_cut_from_a_card():
    section = (
        f"<!-- lorakit certificate {'a' * 64} -->\n\n## Did the task survive?\n\n<!-- end of lorakit's certificate -->"
    )
    assert without_certificate(f"# A\n\nb\n\n{section}\n\n## C\n") == "# A\n\nb\n\n## C\n"
    assert without_certificate(f"# A\n\n{section}\n") == "# A\n"
    assert without_certificate(f"# A\n{section}\nb\n{section}\n") == "# A\n\nb\n"
    for text in ("", "# A\n\n\n", "## Did the task survive?\n\nYes, says its author.\n"):
        assert without_certificate(text) == text


class FakeHub:
    """What huggingface_hub's HfApi is asked to do."""

    calls: ClassVar[list] = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, folder_path, repo_id, allow_patterns, **options):
        files = huggingface_hub.utils.filter_repo_objects(
            [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()],
            allow_patterns=allow_patterns,
        )
        self.calls.append(("upload", repo_id, sorted(files), options))
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


def test_a_certified_adapter_goes_to_the_hub_whole(home, tmp_path, hub):
    _, certificate = compressed(home, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").write_bytes(b"large")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    address = evaluation.push_to_hub(tmp_path / "out", "me/small", private=True, commit_message="Add it")
    assert address == "https://hub/me/small/commit/1"
    created, uploaded = hub.calls
    assert created == ("create", "me/small", {"private": True, "exist_ok": True})
    assert uploaded[2] == sorted([CARD, "adapter_config.json", WEIGHTS, CERTIFICATE, "tokenizer.json"])
    assert uploaded[3] == {"revision": None, "commit_message": "Add it"}
    # A certificate that is given is put beside the adapter and into its card first.
    shutil.copytree(home / "good", tmp_path / "plain")
    truncate(home / "good", tmp_path / "plain", max_rank=4, overwrite=True)
    evaluation.push_to_hub(tmp_path / "plain", "me/small", certificate=certificate)
    assert evaluation.read_certificate(tmp_path / "plain") == certificate
    assert certificate.sha256 in (tmp_path / "plain" / CARD).read_text()


def test_what_is_not_pushed(home, tmp_path, hub):
    with pytest.raises(EvaluationError, match="no certificate beside the adapter in .*good'"):
        evaluation.push_to_hub(home / "good", "me/small")
    _, certificate = compressed(home, tmp_path / "out")
    forged = replace(certificate, verdict="FAIL")
    forged = replace(forged, sha256=digest({k: v for k, v in forged.to_dict().items() if k != "sha256"}))
    with pytest.raises(EvaluationError, match="its scores give PASS, it says FAIL"):
        evaluation.push_to_hub(tmp_path / "out", "me/small", certificate=forged)
    # PEFT writes new weights into a directory and leaves the certificate there.
    shutil.copyfile(home / "bad" / WEIGHTS, tmp_path / "out" / WEIGHTS)
    with pytest.raises(EvaluationError, match="is not of the adapter in .*out'.* Certify this adapter"):
        evaluation.push_to_hub(tmp_path / "out", "me/small")
    assert hub.calls == []
