"""A comparison of methods on a tiny BERT: what is trained, which rates are chosen, what is compared, and going on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from classified import sentences, write_bert, write_images, write_lines, write_vit
from peft import LoraConfig

import lorakit
from lorakit import experiments
from lorakit.errors import EvaluationError, PlanError
from lorakit.evaluation import classification
from lorakit.experiments import _compare_trials
from lorakit.statistics import holm, seeds_interval

pytestmark = pytest.mark.slow

COLUMNS = {"text": "sentence", "label": "label"}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
METHODS = {
    "LoRA": LORA,
    "SpecLoRA": {"peft_type": "SPECLORA", "k": 16, **LORA},
    "rank 1": {**LORA, "r": 1, "learning_rate": 1e-5},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with base/, train.jsonl and dev.jsonl, which have three documents in common."""
    home = tmp_path_factory.mktemp("methods")
    write_bert(home / "base")
    rows = sentences(140)
    write_lines(home / "train.jsonl", rows[:103])
    write_lines(home / "dev.jsonl", rows[100:])
    return home


@pytest.fixture(scope="module")
def arguments(home):
    dev = home / "dev.jsonl"
    return {
        "base": home / "base",
        "train": {"source": home / "train.jsonl", "columns": COLUMNS, "length": 16},
        "methods": METHODS,
        "tasks": [classification(dev, metric=metric, columns=COLUMNS, length=16) for metric in ("mcc", "loss")],
        "model": "sequence_classification",
        "steps": 40,
        "learning_rates": [1e-5, 5e-3],
        "validation": 20,
        "batch_size": 16,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "margin": 0.5,
        "options": lorakit.evaluation.LoadOptions(device="cpu"),
        "progress": False,
    }


@pytest.fixture(scope="module")
def finished(arguments, home):
    """A comparison that ran to its end, and its directory."""
    return experiments.compare_methods(**arguments, directory=home / "finished"), home / "finished"


def forbidden(**_):
    raise AssertionError("this trial has a record")


def records(directory):
    found = [json.loads(path.read_text()) for path in (directory / "records").glob("*.json")]
    return {record["key"]: record for record in found}


def method(report, name):
    return next(one for one in report.methods if one.name == name)


def test_the_data_are_split_and_documents_of_the_tasks_are_left_out(finished):
    report, directory = finished
    assert (report.data["documents"], report.data["validation"], report.data["copies"]) == (80, 20, 0)
    assert report.data["overlap"] == {"dev mcc": 3, "dev loss": 3}
    assert (report.data["steps"], report.data["warmup_steps"]) == (40, 4)
    assert [finding.code for finding in report.findings].count("overlap_left_out") == 2
    assert len(records(directory)["training data"]["result"]["left_out"]) == 3


def test_the_chosen_rate_has_the_smallest_validation_loss_and_the_edge_is_a_finding(finished):
    report, directory = finished
    lora = method(report, "LoRA")
    losses = {rate: records(directory)[f"LoRA, learning rate {rate:g}, seed 0"]["result"] for rate in (1e-5, 5e-3)}
    assert losses[5e-3]["validation_loss"] < losses[1e-5]["validation_loss"]
    assert lora.learning_rate == 5e-3
    assert {one.learning_rate: one.validation_loss for one in lora.tried} == {
        rate: result["validation_loss"] for rate, result in losses.items()
    }
    assert lora.at_edge
    assert method(report, "rank 1").tried == ()
    assert not method(report, "rank 1").at_edge
    edges = [finding.message for finding in report.findings if finding.code == "learning_rate_at_edge"]
    assert [message.partition(":")[0] for message in edges] == ["LoRA", "SpecLoRA"]


def test_every_training_has_a_record_and_only_chosen_rates_have_every_seed(finished):
    wanted = {"training data"}
    for name, chosen, other in (("LoRA", "0.005", "1e-05"), ("SpecLoRA", "0.005", "1e-05"), ("rank 1", "1e-05", None)):
        wanted |= {f"{name}, learning rate {chosen}, seed {seed}" for seed in (0, 1, 2)}
        wanted |= {f"{name}, learning rate {other}, seed 0"} if other else set()
    assert set(records(finished[1])) == wanted


def test_parameters_are_the_methods_own_and_the_heads_are_counted_apart(finished):
    report, _ = finished
    inner, outer = 32, 48
    rank_one = 2 * (4 * 2 * inner + 2 * (inner + outer)) + 2 * inner  # two layers and the pooler
    assert method(report, "LoRA").parameters == 4 * rank_one
    assert method(report, "rank 1").parameters == rank_one
    assert method(report, "SpecLoRA").parameters == 4 * rank_one + 13 * 16
    assert {one.head_parameters for one in report.methods} == {2 * 32 + 2}


def test_all_methods_start_from_one_head_and_see_the_same_batches(finished):
    found = records(finished[1])
    losses = [found[f"{name}, learning rate 1e-05, seed 0"]["result"]["validation_loss"] for name in METHODS]
    assert max(losses) - min(losses) < 1e-3  # at this rate nothing is learned


def test_differences_outcomes_and_verdicts_are_those_of_the_scores(finished):
    report, _ = finished
    scores = report.scores
    labels = np.array(scores.labels["dev mcc"])
    for one in report.methods:
        task = one.tasks[0]
        means = [
            np.corrcoef(labels, seed)[0, 1] if len(set(seed)) > 1 else 0.0
            for seed in scores.methods[one.name]["dev mcc"]
        ]
        assert task.seed_means == pytest.approx(means)
        assert task.mean == pytest.approx(np.mean(means))
    reference = scores.methods["LoRA"]["dev loss"]
    intervals = [seeds_interval(reference, scores.methods[name]["dev loss"]) for name in ("SpecLoRA", "rank 1")]
    worse = holm([interval.p_value(0.0, alternative="less") for interval in intervals])
    for name, interval, p_value in zip(("SpecLoRA", "rank 1"), intervals, worse, strict=True):
        task = method(report, name).tasks[1]
        assert (task.difference, task.lower, task.upper) == pytest.approx(
            (interval.difference, interval.lower, interval.upper)
        )
        assert task.worse_p_value == pytest.approx(p_value)
    assert method(report, "rank 1").tasks[1].outcome == "worse"
    assert method(report, "LoRA").tasks[1].outcome is None
    assert method(report, "LoRA").verdict is None
    assert method(report, "SpecLoRA").verdict is not None
    assert report.headline.startswith("On dev mcc, of 2 methods")


def test_a_report_is_read_back_verified_and_shown(finished):
    report, directory = finished
    again = experiments.read_methods(directory / "methods.json")
    assert again == report
    again.verify()
    assert "outcome" in (directory / "report.html").read_text()
    assert len(report.rows()) == 6
    assert [table.title for table in report.tables()] == ["dev mcc", "dev loss", "Learning rates", "Seeds"]
    assert len(report.plot().axes) == 2
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("field", ["signature", "figures", "verdict"])
def test_a_report_that_was_changed_does_not_verify(finished, field):
    report, _ = finished
    if field == "signature":
        changed = replace(report, alpha=0.01)
    elif field == "figures":
        one = report.methods[1]
        tasks = (replace(one.tasks[0], mean=one.tasks[0].mean + 0.1), *one.tasks[1:])
        changed = replace(report, methods=(report.methods[0], replace(one, tasks=tasks), report.methods[2]))
    else:
        changed = replace(report, verdict="PASS" if report.verdict != "PASS" else "FAIL")
    changed = changed if field == "signature" else replace(changed, sha256=changed.signed())
    with pytest.raises(EvaluationError, match="does not verify"):
        changed.verify()


def test_the_same_call_runs_nothing_again_and_another_setting_is_an_error(finished, arguments, monkeypatch):
    report, directory = finished
    monkeypatch.setattr(_compare_trials, "train_and_score", forbidden)
    again = experiments.compare_methods(**arguments, directory=directory)
    assert (again.methods, again.scores) == (report.methods, report.scores)
    with pytest.raises(PlanError, match="training.batch_size 16, now 8"):
        experiments.compare_methods(**arguments | {"batch_size": 8}, directory=directory)


def test_adapters_are_kept_and_can_be_loaded_with_their_head(finished, home):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    report, _ = finished
    spec = method(report, "SpecLoRA")
    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    model = PeftModel.from_pretrained(base, spec.adapters[1]).eval()
    task = classification(home / "dev.jsonl", metric="mcc", columns=COLUMNS, length=16)
    scores = lorakit.evaluation.evaluate(
        model, task, tokenizer=AutoTokenizer.from_pretrained(home / "base"), progress=False
    )
    assert scores["dev mcc"].scores == report.scores.methods["SpecLoRA"]["dev mcc"][1]


def test_training_learns_on_this_data(finished):
    means = method(finished[0], "LoRA").tasks[1].seed_means
    assert -np.mean(means) < 0.66 < math.log(2)


@pytest.fixture(scope="module")
def quick(arguments):
    """Arguments of a short comparison without tuning."""
    changed = {"steps": 2, "learning_rates": None, "learning_rate": 1e-3, "validation": None, "margin": None}
    return {**arguments, **changed, "save_adapters": False, "methods": {"a": {**LORA, "r": 1}, "b": {**LORA, "r": 2}}}


def test_ks_and_ranks_come_from_a_probe_and_a_control_has_them_shuffled_for_each_seed(quick, tmp_path):
    probe = {"num_examples": 8, "train_steps": 2, "ladder": [1, 4, 8, 16, 32]}
    spec = {"peft_type": "SPECLORA", "k": 8, "r": 1, "target_modules": "all-linear"}
    fisher = {"peft_type": "FISHERLORA", "r": 4, "target_modules": ["query", "key", "value"]}
    methods = {
        "uniform": spec,
        "probed": {**spec, "from_probe": probe},
        "shuffled": {**spec, "from_probe": "probed", "shuffle_seed": 5},
        "ranks": {**fisher, "from_probe": {"num_examples": 8, "train_steps": 1, "budget": 0.5, "rule": "fisher"}},
        "shuffled ranks": {**fisher, "from_probe": "ranks", "shuffle_seed": 5},
    }
    report = experiments.compare_methods(**quick | {"methods": methods}, directory=tmp_path)
    found = records(tmp_path)
    values = found["probe of probed"]["result"]["values"]
    assert len(values) == 13
    assert len(set(values.values())) > 1
    assert sum(values.values()) <= 13 * 8
    assert method(report, "probed").parameters == method(report, "shuffled").parameters
    assert method(report, "uniform").parameters - method(report, "probed").parameters == 13 * 8 - sum(values.values())

    def patterns(name, field):
        keys = [f"{name}, learning rate 0.001, seed {seed}" for seed in (0, 1, 2)]
        return [found[key]["settings"]["config"][field] for key in keys]

    assert patterns("probed", "k_pattern")[0] == patterns("probed", "k_pattern")[2]
    assert patterns("shuffled", "k_pattern")[0] != patterns("shuffled", "k_pattern")[1]
    ranks = found["probe of ranks"]["result"]["values"]
    assert sum(ranks.values()) <= 6 * 4 // 2
    assert method(report, "ranks").parameters == 64 * sum(ranks.values())
    assert method(report, "shuffled ranks").parameters == 64 * sum(ranks.values())
    assert report.settings["methods"]["shuffled"]["probe"]["of"] == "probed"


def test_adalora_dora_and_a_config_object_are_compared_too(quick, tmp_path):
    ada = {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "target_modules": ["query", "value"]}
    methods = {
        "config": LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        "DoRA": {**LORA, "use_dora": True},
        "AdaLoRA": ada,
    }
    report = experiments.compare_methods(**quick | {"methods": methods, "steps": 6}, directory=tmp_path)
    assert [one.peft_type for one in report.methods] == ["LORA", "LORA", "ADALORA"]
    assert report.verdict is None
    assert [one.verdict for one in report.methods] == [None, None, None]
    assert all(one.adapters == () for one in report.methods)
    assert not (tmp_path / "adapters").exists()


def test_batches_of_similar_length_hold_every_document_once_an_epoch():
    from lorakit.experiments._training import _grouped

    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": [0] * n} for n in np.random.default_rng(0).integers(1, 30, 103)]
    batches = _grouped(data, 8, 26, generator)
    assert [len(batches), sorted(i for batch in batches[:13] for i in batch)] == [26, list(range(103))]
    spread = [np.ptp([len(data[i]["input_ids"]) for i in batch]) for batch in batches]
    assert np.mean(spread) < 15
    assert batches[:13] != batches[13:]


def test_grouped_batches_are_trained_on(quick, tmp_path):
    report = experiments.compare_methods(**quick | {"group_by_length": True}, directory=tmp_path)
    assert report.settings["group_by_length"] is True


def test_shards_do_their_part_and_the_last_one_reports(quick, tmp_path):
    parts = {**quick, "directory": tmp_path}
    first = experiments.compare_methods(**parts, shard="1/2")
    assert first.verdict == "INCONCLUSIVE"
    assert "3 of 6 trials of the stage 'trainings'" in first.headline
    assert experiments.compare_methods(**parts, shard="2/2").data["documents"] == 100


def test_workers_give_what_one_process_gives(quick, tmp_path):
    alone = experiments.compare_methods(**quick, directory=tmp_path / "alone")
    with experiments.process_pool(2, threads=1) as executor:
        together = experiments.compare_methods(**quick, directory=tmp_path / "together", executor=executor)
    for name, tasks in alone.scores.methods.items():
        assert together.scores.methods[name]["dev loss"] == pytest.approx(np.array(tasks["dev loss"]), abs=1e-5)


def test_texts_to_continue(tmp_path, tiny_llama):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(62))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama().save_pretrained(tmp_path / "base")
    texts = [{"text": " ".join(f"w{(start + i) % 61}" for i in range(6))} for start in range(40)]
    write_lines(tmp_path / "train.jsonl", texts[:32])
    write_lines(tmp_path / "test.jsonl", texts[30:])
    report = experiments.compare_methods(
        tmp_path / "base",
        {"source": tmp_path / "train.jsonl", "length": 8},
        methods={
            "LoRA": {"r": 2, "target_modules": ["q_proj"]},
            "DoRA": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
        },
        tasks=lorakit.evaluation.loss(tmp_path / "test.jsonl", length=8),
        directory=tmp_path / "out",
        epochs=1,
        batch_size=8,
        learning_rates=[1e-4, 1e-2],
        progress=False,
    )
    assert (report.data["documents"], report.data["validation"], report.data["overlap"]) == (27, 3, {"test": 2})
    assert report.data["steps"] == math.ceil(27 / 8)
    assert {one.head_parameters for one in report.methods} == {0}


def test_images(tmp_path):
    write_vit(tmp_path / "vit")
    write_images(tmp_path / "train", 24)
    write_images(tmp_path / "test", 8, seed=1)
    report = experiments.compare_methods(
        tmp_path / "vit",
        {"source": tmp_path / "train"},
        methods={
            "LoRA": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
            "SpecLoRA": {"peft_type": "SPECLORA", "r": 2, "k": 8, "target_modules": ["q_proj", "v_proj"]},
        },
        tasks=classification(tmp_path / "test"),
        directory=tmp_path / "out",
        model="image_classification",
        epochs=2,
        batch_size=8,
        learning_rate=1e-2,
        progress=False,
    )
    assert report.data["steps"] == 6
    assert {one.head_parameters for one in report.methods} == {2 * 32 + 2}
    assert method(report, "SpecLoRA").parameters - method(report, "LoRA").parameters == 2 * 8


def test_one_method_is_trained_and_scored_alone(quick, tmp_path):
    changed = {"methods": {"only": LORA}, "margin": 0.1}
    report = experiments.compare_methods(**quick | changed, directory=tmp_path)
    report.verify()
    assert report.verdict is None
    assert report.headline.startswith("only scores")
    assert any("nothing to compare" in text.get_text() for text in report.plot().texts)


@pytest.mark.parametrize("labels", ["tokens", "examples"])
def test_micro_batches_have_the_gradient_and_the_loss_of_the_whole_batch(labels, tiny_llama, home):
    from lorakit.evaluation import LoadOptions
    from lorakit.evaluation._models import load_classifier
    from lorakit.experiments._training import micro_batches

    mask = torch.arange(9) < torch.tensor([[9], [4], [6], [3], [2]])
    ids = torch.randint(4, 30, (5, 9), generator=torch.Generator().manual_seed(0)) * mask
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1, 1, 0, 1])}
    model = load_classifier(home / "base", LoadOptions(device="cpu"), task_type="SEQ_CLS", num_labels=2)[0]
    if labels == "tokens":
        model, batch["labels"] = tiny_llama(), torch.where(mask, ids, -100)
    model.eval()

    def gradient(parts):
        model.zero_grad()
        loss = sum(share * model(**part).loss for part, share in parts)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    parts = micro_batches(batch, 2)
    assert [part["input_ids"].shape for part, _ in parts] == [(2, 9), (2, 6), (1, 2)]
    assert sum(share for _, share in parts) == pytest.approx(1)
    (loss, whole), (other, summed) = gradient(micro_batches(batch, None)), gradient(parts)
    assert other == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-6)


def test_a_training_in_micro_batches_says_so(quick, tmp_path):
    report = experiments.compare_methods(**quick | {"micro_batch_size": 3}, directory=tmp_path)
    assert report.settings["micro_batch_size"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "`methods` must map names to PEFT configs"),
        (
            {"methods": {"a": LORA, "b": {"peft_type": "LORAX"}}},
            "`methods\\['b'\\]`: `peft_type` must be one of .*SPECLORA",
        ),
        ({"methods": {"a": LORA, "b": {"rank": 4}}}, "has the key 'rank', which is no field of LoraConfig"),
        ({"methods": {"a": LORA, "b": {"lora_alfa": 4}}}, "did you mean 'lora_alpha'"),
        ({"methods": {"a": LORA, "b": {"peft_type": "SPECLORA", "k": 0}}}, "`methods\\['b'\\]`: SpecLoRA: `k` must be"),
        ({"methods": {"a": LORA, "b": {**LORA, "from_probe": {}}}}, "`from_probe` is for SPECLORA and FISHERLORA"),
        (
            {"methods": {"a": LORA, "b": {**LORA, "from_probe": "a"}}},
            "must be a method with a probe of its own; got 'a'",
        ),
        (
            {"methods": {"a": LORA, "b": {"peft_type": "SPECLORA", "from_probe": {"ks": 1}}}},
            "must be the name of another method, or a mapping with any of num_examples",
        ),
        ({"learning_rate": None}, "has no learning rate"),
        ({"learning_rates": [1e-3]}, "cannot both be given"),
        ({"learning_rate": None, "learning_rates": []}, "must be a list of numbers; got \\[\\]"),
        ({"learning_rate": None, "learning_rates": [1e-3, 1e-3]}, "must be different"),
        ({"learning_rate": None, "learning_rates": [1e-3, 1e-2], "validation": 0}, "`validation` must be a positive"),
        ({"validation": 1000}, "`validation` must leave documents to train on"),
        ({"reference": "c"}, "`reference` must be one of the methods a, b; got 'c'"),
        ({"epochs": 1.0}, "One of `steps` and `epochs`"),
        ({"steps": None}, "One of `steps` and `epochs`"),
        ({"warmup_steps": 1}, "`warmup_steps` and `warmup_ratio` cannot both"),
        ({"warmup_ratio": 1.5}, "`warmup_ratio` must be in"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"schedule": "step"}, "`schedule` must be one of"),
        ({"model": "token_classification"}, "`model` must be one of causal_lm, sequence_classification"),
        ({"seeds": [0, 1]}, "`seeds` must be at least 3"),
        ({"train": {"source": "x.jsonl", "packing": True}}, "`train` must be a path"),
        ({"margin": -1.0}, "`margin` must be"),
    ],
)
def test_arguments_that_are_wrong(quick, tmp_path, changes, message):
    with pytest.raises((ValueError, lorakit.errors.TrialError), match=message):
        experiments.compare_methods(**quick | changes, directory=tmp_path)


def test_a_margin_is_needed_where_one_task_has_its_own(quick, tmp_path, home):
    tasks = [
        classification(home / "dev.jsonl", name=name, columns=COLUMNS, margin=margin)
        for name, margin in (("a", None), ("b", 0.1))
    ]
    with pytest.raises(EvaluationError, match="`margin` must be given where some tasks have their own; 'a' has none"):
        experiments.compare_methods(**quick | {"tasks": tasks}, directory=tmp_path)


def test_a_file_runs_from_the_shell_and_is_verified(home, tmp_path):
    text = f"""
base: {home / "base"}
model: sequence_classification
train: {{source: {home / "train.jsonl"}, length: 16, columns: {{text: sentence, label: label}}}}
tasks: {{classification: {home / "dev.jsonl"}, metric: loss, length: 16, columns: {{text: sentence, label: label}}}}
methods:
  LoRA: {{r: 1, target_modules: all-linear, learning_rate: 1e-3}}
  DoRA: {{r: 1, target_modules: all-linear, use_dora: true, learning_rates: [1e-3, 2e-3]}}
steps: 1
directory: {tmp_path / "out"}
device: cpu
"""
    file = tmp_path / "methods.yaml"
    file.write_text(text)
    command = [sys.executable, "-W", "ignore", "-m", "lorakit", "bench"]
    done = subprocess.run([*command, str(file), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["reference"] == "LoRA"
    checked = subprocess.run(
        [*command, str(tmp_path / "out" / "methods.json"), "--verify"], capture_output=True, text=True, check=True
    )
    assert "The bench verifies." in checked.stdout
