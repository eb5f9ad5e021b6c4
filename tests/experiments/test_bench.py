"""A bench on a tiny model: its gate, its variants, its verdicts, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_reports

import lorakit
from lorakit import experiments
from lorakit.compress import truncate
from lorakit.errors import EvaluationError, PlanError, TrialError
from lorakit.experiments import _bench_trials
from lorakit.statistics import seeds_interval

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
PROBE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with base/ and texts that count in steps of two, from different starts, to train and to test on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("bench")
    words = ["<unk>", "<pad>", "<eos>", *(f"w{i}" for i in range(61))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(home / "base")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).save_pretrained(home / "base")
    texts = [" ".join(f"w{(start + step * i) % 61}" for i in range(8)) for start in range(60) for step in (1, 2)]
    order = np.random.default_rng(0).permutation(len(texts))
    for name, rows in (("train", order[:80]), ("test", order[80:])):
        content = "".join(json.dumps({"text": texts[i]}) + "\n" for i in rows)
        (home / f"{name}.jsonl").write_text(content)
    return home


@pytest.fixture(scope="module")
def arguments(home):
    return {
        "base": home / "base",
        "train": {"source": home / "train.jsonl", "length": 16},
        "tasks": lorakit.evaluation.loss(home / "test.jsonl", length=16),
        "margin": 0.05,
        "gate": 0.05,
        "probe": PROBE,
        "steps": 60,
        "learning_rate": 2e-2,
        "batch_size": 8,
        "policies": ("per_module", 4, 1),
        "progress": False,
    }


@pytest.fixture(scope="module")
def finished(arguments, home):
    """A bench that ran to its end, and its directory."""
    directory = home / "finished"
    return experiments.bench(**arguments, directory=directory), directory


def by_name(report):
    return {variant.name: variant for variant in report.variants}


def forbidden(**_):
    raise AssertionError("this trial has a record")


def test_the_probe_learns_and_passes_the_gate(finished):
    report, _ = finished
    (gate,) = report.gate
    assert gate.passed
    assert gate.lower > gate.minimum == 0.05
    assert gate.gain == pytest.approx(gate.probe_mean - gate.base_mean)


def test_variants_at_the_probes_own_ranks_are_the_probe_and_pass(finished):
    variants = by_name(finished[0])
    trained, cut = variants["rank 4, retrained"], variants["rank 4, truncated"]
    assert trained.tasks[0].seed_differences == pytest.approx((0, 0, 0), abs=1e-6)
    assert cut.tasks[0].seed_differences == pytest.approx((0, 0, 0), abs=1e-6)
    assert (trained.verdict, cut.verdict) == ("PASS", "PASS")
    assert cut.energy_kept == pytest.approx(1)
    assert trained.parameters == finished[0].probe["parameters"]


def test_a_variant_has_the_median_ranks_of_the_probes_audits_and_the_probes_scaling(finished):
    report, directory = finished
    audits = [lorakit.lens.audit(directory / "adapters" / f"probe-seed-{seed}", suggest_ranks=True) for seed in SEEDS]
    suggested = [next(s for s in audit.suggestions if s.policy == "per_module").ranks for audit in audits]
    wanted = {name: int(np.median([ranks[name] for ranks in suggested])) for name in suggested[0]}
    for method in ("retrained", "truncated"):
        variant = by_name(report)[f"per_module, {method}"]
        assert variant.ranks == wanted
        assert len(variant.adapters) == len(SEEDS)
        for adapter in variant.adapters:
            modules = lorakit.lens.audit(adapter).modules
            assert {module.module_name: module.rank for module in modules} == wanted
            assert {module.scaling for module in modules} == {2.0}
            assert variant.parameters == sum(module.parameters for module in modules)


def test_the_figures_are_those_of_a_certificate_on_the_same_adapters(finished, arguments):
    report, _ = finished
    variant = by_name(report)["rank 1, truncated"]
    certificate = lorakit.evaluation.certify(
        arguments["base"],
        list(report.probe["adapters"]),
        list(variant.adapters),
        tasks=arguments["tasks"],
        margin=0.05,
        progress=False,
    )
    (row,) = certificate.tasks
    (task,) = variant.tasks
    for name in ("difference", "lower", "upper", "worst_seed_difference", "documents_needed", "verdict"):
        assert getattr(task, name) == pytest.approx(getattr(row, name), abs=1e-6), name
    assert task.probe_mean == pytest.approx(row.reference_mean, abs=1e-6)


def test_verdicts_are_holms_over_the_variants(finished):
    report, _ = finished
    probe = report.scores.probe["test"]
    p = {name: seeds_interval(probe, scores["test"]).p_value(-0.05) for name, scores in report.scores.variants.items()}
    ordered = sorted(p, key=p.get)
    adjusted, largest = {}, 0.0
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, p[name] * (len(p) - place)))
        adjusted[name] = largest
    assert {v.name: v.pass_p_value for v in report.variants} == pytest.approx(adjusted)
    assert {v.name for v in report.variants if v.verdict == "PASS"} == {n for n, q in adjusted.items() if q < 0.05}


def test_every_training_cut_and_evaluation_has_a_record(finished):
    _, directory = finished
    keys = [json.loads(path.read_text())["key"] for path in (directory / "records").glob("*.json")]
    variants = [f"{label} {how}" for label in (finished_labels(finished)) for how in ("retrained", "truncated")]
    adapters = [f"{name}, seed {seed}" for name in ("probe", *variants) for seed in SEEDS]
    scores = [f"test of {name}" for name in ("the base model", *adapters)]
    assert sorted(keys) == sorted(["training data", *adapters, *scores])


def finished_labels(finished):
    """The labels of the three variants' ranks: one rank each, or a hash."""
    return {re.sub(r"-(retrained|truncated).*", "", Path(v.adapters[0]).name) for v in finished[0].variants}


def test_the_same_call_runs_nothing_again(finished, arguments, monkeypatch):
    report, directory = finished
    for name in ("read_data", "train", "cut", "score"):
        monkeypatch.setattr(_bench_trials, name, forbidden)
    again = experiments.bench(**arguments, directory=directory)
    assert again.variants == report.variants
    assert again.gate == report.gate


def test_batches_can_be_grouped_by_length(arguments, tmp_path, monkeypatch):
    seen = []
    original = _bench_trials.batches_of
    monkeypatch.setattr(
        _bench_trials, "batches_of", lambda *given: (seen.append(given[1].group_by_length), original(*given))[1]
    )
    report = experiments.bench(**{**arguments, "steps": 2, "group_by_length": True}, directory=tmp_path)
    assert seen == [True] * 3  # the probes; they do not pass the gate
    assert report.settings["group_by_length"] is True


def test_other_settings_are_refused(finished, arguments):
    with pytest.raises(PlanError, match="has other settings: training.steps 60, now 61"):
        experiments.bench(**{**arguments, "steps": 61}, directory=finished[1])


def test_an_adapter_that_was_changed_is_refused(finished, arguments, tmp_path):
    shutil.copytree(finished[1], tmp_path / "copy")
    for path in (tmp_path / "copy" / "records").glob("test-of-*"):
        path.unlink()
    shutil.copytree(
        finished[1] / "adapters" / "probe-seed-1", tmp_path / "copy" / "adapters" / "probe-seed-0", dirs_exist_ok=True
    )
    with pytest.raises(TrialError, match="is not the one that the bench wrote: it was changed or removed since"):
        experiments.bench(**arguments, directory=tmp_path / "copy")


def test_the_report_on_disk_verifies_and_one_changed_figure_does_not(finished, tmp_path):
    report, directory = finished
    kept = experiments.read_bench(directory / "bench.json")
    kept.verify()
    assert (kept.variants, kept.gate, kept.scores) == (report.variants, report.gate, report.scores)
    text = (directory / "bench.json").read_text()
    for name, value in (("gain", 9.0), ("sha256", "0" * 64)):
        changed = re.sub(rf'"{name}": [^,\n]+', f'"{name}": {json.dumps(value)}', text, count=1)
        assert changed != text
        (tmp_path / "changed.json").write_text(changed)
        with pytest.raises(EvaluationError, match="does not verify: its content is not what its SHA-256 says"):
            experiments.read_bench(tmp_path / "changed.json").verify()


def test_figures_that_are_not_those_of_the_scores_do_not_verify_even_with_a_new_hash(finished):
    report, _ = finished
    first = replace(report.variants[0], verdict="FAIL" if report.variants[0].verdict != "FAIL" else "PASS")
    forged = replace(report, variants=(first, *report.variants[1:]))
    forged = replace(forged, sha256=forged.signed())
    with pytest.raises(EvaluationError, match="its variants are not those of its scores"):
        forged.verify()


def test_a_file_that_is_no_bench_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"other.json' is not a bench of lorakit's"):
        experiments.read_bench(tmp_path / "other.json")


def test_the_page_and_the_table_show_every_variant(finished):
    report, directory = finished
    page = (directory / "report.html").read_text()
    first = report.tables()[0]
    for variant, row in zip(report.variants, first.rows, strict=True):
        assert row[0] == variant.name
        assert row[-1] == variant.verdict
        assert variant.name in page
    assert "gate, test: base" in page
    assert "verdict: after Holm's adjustment over 6 variants" in first.note
    assert len(report.rows()) == len(report.variants)
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.to_frame().verdict.tolist() == [variant.verdict for variant in report.variants]


def test_policies_that_agree_are_one_variant(finished, arguments):
    report, directory = finished
    again = experiments.bench(**{**arguments, "policies": ("per_module", 4, 1, "entropy", "knee")}, directory=directory)
    ranks = [tuple(variant.ranks.items()) for variant in again.variants if variant.method == "retrained"]
    assert len(set(ranks)) == len(ranks)
    assert sorted(p for v in again.variants if v.method == "truncated" for p in v.policies) == sorted(
        ["per_module", "rank 4", "rank 1", "entropy", "knee"]
    )
    assert {v.name for v in report.variants if "per_module" not in v.name} <= {v.name for v in again.variants} | {
        v.name for v in report.variants
    }


def test_a_probe_that_was_not_trained_stops_at_the_gate(arguments, tmp_path):
    report = experiments.bench(**{**arguments, "learning_rate": 1e-9}, directory=tmp_path)
    assert not report.passed_gate
    assert report.verdict == "INCONCLUSIVE"
    assert report.variants == ()
    assert report.headline.startswith("Stopped at the gate: the probe gains")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [f"probe-seed-{s}" for s in SEEDS]
    assert "Stopped at the gate" in (tmp_path / "report.html").read_text()
    experiments.read_bench(tmp_path / "bench.json").verify()


def test_a_damaged_variant_fails(finished, arguments, tmp_path, monkeypatch):
    """The cut adapters get a third of their modules damaged; the trained ones stay as they are."""
    from safetensors.torch import load_file, save_file

    def damaging(adapter, out, **options):
        report = truncate(adapter, out, **options)
        file = Path(out) / "adapter_model.safetensors"
        tensors = load_file(file)
        generator = torch.Generator().manual_seed(0)
        for key, value in tensors.items():
            if "v_proj.lora_B" in key:
                tensors[key] = value + 10 * torch.randn(value.shape, generator=generator)
        save_file(tensors, file)
        return report

    shutil.copytree(finished[1], tmp_path / "copy")
    for path in (tmp_path / "copy" / "records").glob("*truncated*"):
        path.unlink()
    monkeypatch.setattr(_bench_trials, "truncate", damaging)
    report = experiments.bench(**{**arguments, "policies": (4,)}, directory=tmp_path / "copy")
    verdicts = {variant.name: variant.verdict for variant in report.variants}
    assert verdicts["rank 4, truncated"] == "FAIL"
    assert verdicts["rank 4, retrained"] == "PASS"
    assert not by_name(report)["rank 4, truncated"].within_tolerance


def test_a_difference_of_just_the_margin_on_few_documents_is_inconclusive(finished, arguments, home, tmp_path):
    before = finished[0].scores
    few = np.subtract(before.variants["rank 1, truncated"]["test"], before.probe["test"])[:, :2]
    (tmp_path / "few.jsonl").write_text("".join((home / "test.jsonl").read_text().splitlines(keepends=True)[:2]))
    task = lorakit.evaluation.loss(tmp_path / "few.jsonl", length=16, margin=-float(few.mean()))
    shutil.copytree(finished[1], tmp_path / "copy")
    report = experiments.bench(
        **{**arguments, "tasks": task, "gate": -10.0, "policies": (1,), "retrain": False}, directory=tmp_path / "copy"
    )
    (variant,) = report.variants
    assert (variant.verdict, report.verdict) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert report.headline == "INCONCLUSIVE: none of 1 variants is shown to be as good as the probe."
    assert report.next_steps == ("# take more seeds and documents",)


def test_documents_that_are_trained_on_are_refused(arguments, home, tmp_path):
    both = (home / "test.jsonl").read_text() + (home / "train.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "both.jsonl").write_text(both)
    task = lorakit.evaluation.loss(tmp_path / "both.jsonl", length=16)
    with pytest.raises(EvaluationError, match="1 documents of task 'both' are trained on"):
        experiments.bench(**{**arguments, "tasks": task}, directory=tmp_path / "bench")


KILLED = """
import json, sys
import lorakit
arguments = json.loads(sys.argv[1])
task = lorakit.evaluation.loss(arguments.pop("task"), length=16)
lorakit.experiments.bench(**arguments, tasks=task)
"""


def test_a_bench_that_was_killed_goes_on_and_finds_the_same(finished, arguments, tmp_path):
    task = arguments["tasks"]
    plain = {key: value for key, value in arguments.items() if key != "tasks"}
    plain |= {"base": str(plain["base"]), "directory": str(tmp_path / "bench"), "task": str(task.source)}
    plain["train"] = {**plain["train"], "source": str(plain["train"]["source"])}
    worker = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, json.dumps(plain)], env=dict(os.environ))
    records, started = tmp_path / "bench" / "records", time.monotonic()
    while len(list(records.glob("probe*.json"))) < 2 and time.monotonic() - started < 1200:
        assert worker.poll() is None
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 4 <= len(before) < 40
    assert not (tmp_path / "bench" / "bench.json").exists()
    report = experiments.bench(**arguments, directory=tmp_path / "bench")
    assert {name: (records / name).stat().st_mtime_ns for name in before} == before
    wanted, found = finished[0].scores, report.scores
    assert found.variants.keys() == wanted.variants.keys()
    assert_close_reports(found.probe, wanted.probe)
    assert_close_reports(found.variants, wanted.variants)
    leftovers = [path.name for path in (tmp_path / "bench" / "adapters").iterdir() if path.name.startswith(".")]
    assert len(leftovers) <= 1  # of the training that was killed


def test_shards_take_turns_until_all_is_done(finished, arguments, tmp_path):
    seen = []
    for _ in range(8):
        found = {}
        for shard in ("1/2", "2/2"):
            found[shard] = experiments.bench(**arguments, directory=tmp_path, shard=shard)
            if isinstance(found[shard], experiments.UnfinishedBench):
                seen.append(found[shard])
        if all(isinstance(one, experiments.BenchReport) for one in found.values()):
            break
    assert isinstance(found["1/2"], experiments.BenchReport)
    assert seen[0].stage == "base model"
    assert seen[0].headline == (
        "Not finished: 1 of 2 trials of the stage 'base model' have a record; missing are test of the base model."
    )
    assert seen[0].shards == ("2/2",)
    assert found["1/2"].verdict == finished[0].verdict
    assert_close_reports(found["1/2"].scores.variants, finished[0].scores.variants)


def test_another_process_finds_the_same(finished, arguments, tmp_path):
    import multiprocessing

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        report = experiments.bench(**{**arguments, "policies": (4,)}, directory=tmp_path, executor=executor)
    for variant in report.variants:
        assert_close_reports(report.scores.variants[variant.name], finished[0].scores.variants[variant.name])


def test_choices_are_a_task_beside_the_loss(finished, arguments, home, tmp_path):
    rows = [
        {"question": f"w{i} w{i + 1} w{i + 2}", "choices": [f"w{i + 3}", f"w{(i * 7) % 61}"], "answer": 0}
        for i in range(0, 40, 4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = lorakit.evaluation.choices(tmp_path / "questions.jsonl", prompt="{{question}}", margin=0.5)
    shutil.copytree(finished[1], tmp_path / "copy")
    changed = {"tasks": [arguments["tasks"], task], "gate": -10.0, "policies": (1,), "retrain": False}
    report = experiments.bench(**{**arguments, **changed}, directory=tmp_path / "copy")
    (variant,) = report.variants
    assert [one.name for one in variant.tasks] == ["test", "questions"]
    assert {score for seed in report.scores.probe["questions"] for score in seed} <= {0.0, 1.0}
    assert [finding.code for finding in report.findings] == ["overlap_not_checked"]
    assert [table.title for table in report.tables()] == ["", "Sizes", "Every task", "Ranks"]


@pytest.mark.parametrize(("verdict", "code"), [("PASS", 0), ("FAIL", 1), ("INCONCLUSIVE", 3)])
def test_the_command_exits_with_the_verdict(finished, home, tmp_path, monkeypatch, capsys, verdict, code):
    from lorakit.cli.app import app

    content = {"base": str(home / "base"), "train": "t.jsonl", "tasks": "x.jsonl", "margin": 1, "probe": {"r": 4}}
    (tmp_path / "bench.yaml").write_text(json.dumps({**content, "directory": "d", "steps": 1, "learning_rate": 1}))
    given = {}
    monkeypatch.setattr(experiments, "bench", lambda **a: given.update(a) or replace(finished[0], verdict=verdict))
    with pytest.raises(SystemExit) as stopped:
        app(["bench", str(tmp_path / "bench.yaml"), "--shard", "1/2", "--json"])
    assert stopped.value.code == code
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict
    assert (given["steps"], given["shard"], given["executor"]) == (1, "1/2", None)


def test_the_command_verifies_a_report(finished, capsys):
    from lorakit.cli.app import app

    with pytest.raises(SystemExit) as stopped:
        app(["bench", str(finished[1] / "bench.json"), "--verify"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith("The bench verifies.")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": (0, 1)}, EvaluationError, "`seeds` must be at least 3"),
        ({"seeds": (0, 0, 1)}, ValueError, "`seeds` must be distinct integers"),
        ({"policies": ("median",)}, ValueError, r"`policies` must be of global_median, .* got 'median'"),
        ({"policies": (5,)}, ValueError, "`policies` must be an integer from 1 to 4; got 5"),
        ({"policies": ()}, ValueError, "`policies` must be different, at least one"),
        ({"probe": {"lora_alpha": 8}}, ValueError, r"`probe\['r'\]` must be a positive integer; got None"),
        ({"probe": {**PROBE, "use_dora": True}}, ValueError, "`probe` must be a plain LoRA, .* got 'use_dora'"),
        ({"probe": {**PROBE, "init_lora_weights": "pissa"}}, ValueError, "leaves the base model as it is"),
        ({"probe": 3}, TypeError, "`probe` must be a LoraConfig, or a mapping of its fields; got int"),
        ({"probe": lorakit.FisherLoRAConfig(r=4)}, TypeError, "got FisherLoRAConfig"),
        ({"train": {"source": "x", "size": 3}}, ValueError, "`train` must be a path"),
        ({"train": {"source": "x", "batch_size": 3}}, ValueError, "`train` must not have `batch_size`"),
        ({"retrain": False, "truncate": False}, ValueError, "One of `retrain` and `truncate` must be true"),
        ({"margin": 0}, ValueError, "`margin` must be a finite number above 0; got 0"),
        ({"energy": 0}, ValueError, "`energy` must be a number in"),
        ({"steps": 0}, ValueError, "`steps` must be a positive integer; got 0"),
        ({"batch_size": None}, ValueError, "`batch_size` must be a positive integer; got None"),
        ({"tolerance": -1}, ValueError, "`tolerance` must be a finite number above 0; got -1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        experiments.bench(**{**arguments, **changes}, directory=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()
