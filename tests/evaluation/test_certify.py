"""The machinery's own controls: a reference against itself, a damaged adapter, too few documents, what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit import evaluation
from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import digest
from lorakit.evaluation._scores import interval_of

SLOW = pytest.mark.slow


def certify(home, candidate, task, **options):
    settings = {"margin": 0.05, "progress": False} | options
    return evaluation.certify(home / "base", home / "good", home / candidate, tasks=task, **settings)


def test_an_adapter_against_itself_differs_by_exactly_0_and_passes(home, texts):
    certificate = certify(home, "same", evaluation.loss(texts))
    assert (certificate.difference, certificate.lower, certificate.upper) == (0.0, 0.0, 0.0)
    assert certificate.verdict == "PASS"
    certificate.verify()


@pytest.mark.slow
def test_losses_are_those_of_each_document_alone(home, texts):
    found = evaluation.evaluate_adapters(home / "base", [home / "good"], evaluation.loss(texts), progress=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "good").eval()
    ids = torch.cat([batch["input_ids"] for batch in texts])
    with torch.no_grad():
        expected = [-float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    [scores] = found[str(home / "good")].values()
    assert list(scores.scores) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_damaged_adapter_fails(home, texts):
    certificate = certify(home, "bad", evaluation.loss(texts), margin=0.01)
    assert certificate.verdict == "FAIL"
    assert certificate.upper < -0.01
    [row] = certificate.tasks
    assert row.candidate_mean < row.reference_mean


@pytest.mark.slow
def test_too_few_documents_are_inconclusive(home, texts):
    certificate = certify(home, "bad", evaluation.loss(texts), margin=100.0, limit=4)
    assert certificate.verdict == "PASS"
    near = abs(certificate.difference)
    assert certify(home, "bad", evaluation.loss(texts), margin=near, limit=4).verdict == "INCONCLUSIVE"


def test_an_inconclusive_certificate_says_how_many_documents_are_needed(home):
    right = evaluation.function(lambda model: [1.0] * 200, name="right")
    certificate = certify(home, "same", right, margin=0.01)
    assert certificate.verdict == "INCONCLUSIVE"
    z, power = 1.6448536269514722, 0.8416212335729143
    variance = z**2 / (200 + z**2)
    assert certificate.documents_needed == math.ceil((z + power) ** 2 * variance / 0.01**2)
    assert certificate.next_steps == (
        f"# score {certificate.documents_needed} documents of right for a verdict at this margin",
    )


@SLOW
def test_choices_on_the_harness(home, questions):
    certificate = certify(home, "same", evaluation.choices(questions), margin=0.05)
    assert (certificate.verdict, certificate.difference) == ("PASS", 0.0)
    [row] = certificate.tasks
    assert set(sum(row.reference_scores, ())) <= {0.0, 1.0}
    assert (row.method, row.n) == ("tango", 120)
    # With no discordant document Tango's lower bound is −z²/(n + z²).
    z = 1.6448536269514722
    assert certificate.lower == pytest.approx(-(z**2) / (120 + z**2), abs=1e-9)
    assert certify(home, "same", evaluation.choices(questions, limit=20)).verdict == "INCONCLUSIVE"


@SLOW
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1, 2, 3, 3), (4, 4, 1, 2)])
def test_shared_keys_and_values_give_the_harness_own_log_probabilities(home, lengths):
    from transformers import AutoTokenizer

    from lorakit.evaluation._harness import _shared_prefix_class

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "good").eval()
    language_model = _shared_prefix_class()(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(home / "base"), batch_size=3
    )
    generator = torch.Generator().manual_seed(len(lengths))
    requests = []
    for length in (3, 9, 20):
        context = torch.randint(1, 256, (length,), generator=generator).tolist()
        for n in lengths:
            requests.append((None, context, torch.randint(1, 256, (n,), generator=generator).tolist()))
    shared = language_model._loglikelihood_tokens(requests, disable_tqdm=True)
    own = super(type(language_model), language_model)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [value for value, _ in shared] == pytest.approx([value for value, _ in own], abs=1e-4)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in own]


@SLOW
def test_exact_match_generates(home, tmp_path):
    rows = [{"question": f"say {i}", "answer": "never this"} for i in range(6)]
    (tmp_path / "say.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = evaluation.exact_match(tmp_path / "say.jsonl", max_tokens=4)
    [found] = evaluation.evaluate_adapters(home / "base", [home / "good"], task, progress=False).values()
    assert found["say"].scores == (0.0,) * 6


def test_a_function_s_scores(home):
    def length(model):
        assert not torch.is_grad_enabled()
        return [float(i % 2) for i in range(300)]

    certificate = certify(home, "bad", evaluation.function(length), margin=0.02)
    assert certificate.verdict == "PASS"
    with pytest.raises(EvaluationError, match="not finite"):
        certify(home, "same", evaluation.function(lambda model: [0.0, float("nan")], name="broken"))


def test_several_tasks_and_guards(home, texts):
    loss = evaluation.loss(texts, margin=0.01)
    always = evaluation.function(lambda model: [0.5 + i % 2 for i in range(50)], name="always")
    certificate = certify(home, "bad", always, guards=[loss])
    assert certificate.verdict == "FAIL"
    assert certificate.headline_task == "loss"
    rows = {row.name: row for row in certificate.tasks}
    assert (rows["always"].verdict, rows["loss"].verdict) == ("PASS", "FAIL")
    assert (rows["always"].guard, rows["loss"].guard) == (False, True)
    assert (rows["always"].margin, rows["loss"].margin) == (0.05, 0.01)


@pytest.mark.slow
def test_seeds_are_paired(home, texts):
    three = [home / "good"] * 3
    certificate = evaluation.certify(
        home / "base", three, [home / "same"] * 3, tasks=evaluation.loss(texts), margin=0.01, progress=False
    )
    assert certificate.verdict == "PASS"
    assert certificate.tasks[0].worst_seed_difference == 0.0
    certificate.verify()
    with pytest.raises(EvaluationError, match="at least three seeds"):
        evaluation.certify(home / "base", three[:2], three[:2], tasks=evaluation.loss(texts), margin=0.01)
    with pytest.raises(EvaluationError, match="must have the same seeds"):
        interval_of([[1.0, 2.0]], [[1.0, 2.0]] * 3, 0.05)


@pytest.mark.slow
def test_documents_that_were_used_before_are_refused(home, texts):
    certificate = certify(home, "same", evaluation.loss(texts))
    used = certificate.tasks[0].documents[3:5]
    with pytest.raises(EvaluationError, match="2 documents of task 'loss' were used for calibration or selection"):
        certify(home, "same", evaluation.loss(texts), used_documents=used)


def test_results_are_kept_by_what_they_depend_on(home, texts, tmp_path, monkeypatch):
    task = evaluation.loss(texts, name="held-out")
    first = certify(home, "bad", task, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(type(task), "score", lambda *args, **options: pytest.fail("it was evaluated again"))
    again = certify(home, "bad", task, cache=tmp_path / "cache")
    assert again.tasks == first.tasks


def test_an_adapter_that_is_not_applied_is_an_error(home, texts):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    model = PeftModel.from_pretrained(base, home / "good")
    settings = {"tasks": evaluation.loss(texts), "margin": 0.1, "progress": False}
    model.base_model.disable_adapter_layers()
    with pytest.raises(EvaluationError, match="it is not applied"):
        evaluation.certify(home / "base", model, model, **settings)
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    with pytest.raises(
        EvaluationError, match=r"is merged into the base model's weights .* `unmerge_adapter\(\)` first"
    ):
        evaluation.certify(home / "base", model, model, **settings)


@pytest.mark.slow
def test_models_in_memory(home, texts):
    def load(name):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / name)

    settings = {"tasks": evaluation.loss(texts), "margin": 0.05, "progress": False}
    in_memory = evaluation.certify(load("good").get_base_model(), load("good"), load("bad"), **settings)
    on_disk = certify(home, "bad", evaluation.loss(texts))
    assert in_memory.hashes["base"] == on_disk.hashes["base"]
    assert in_memory.difference == pytest.approx(on_disk.difference, abs=1e-12)
    other = load("good")
    other.get_base_model().lm_head.weight.data[3, 5] += 1
    with pytest.raises(EvaluationError, match="is on a base model with other weights than"):
        evaluation.certify(home / "base", other, other, **settings)


@pytest.mark.slow
def test_the_batch_size_changes_a_loss_by_less_than_is_stated(home, tmp_path):
    rows = [{"text": f"document {i} " + "and more " * (i % 7)} for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [
        evaluation.evaluate_adapters(
            home / "base", [home / "good"], evaluation.loss(tmp_path / "texts.jsonl", batch_size=size), progress=False
        )[str(home / "good")]["texts"]
        for size in (1, 8)
    ]
    assert found[0].documents == found[1].documents
    interval = evaluation.compare(*found)
    assert max(abs(a - b) for a, b in zip(found[0].scores, found[1].scores, strict=True)) < 1e-4
    assert interval.verdict(1e-4) == "PASS"


def test_documents_of_similar_length_run_together_and_come_in_the_order_of_the_file(home, tmp_path):
    rows = [{"text": f"document {i} " + "and more " * (7 * i % 11)} for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    padding = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: padding.append(int((inputs["attention_mask"] == 0).sum())), with_kwargs=True
    )
    task = evaluation.loss(tmp_path / "texts.jsonl", batch_size=4)
    found = evaluation.evaluate(model, task, tokenizer=tokenizer, progress=False)["texts"]
    grouped, in_file_order = sum(padding), 0
    for start in range(0, 20, 4):
        lengths = [len(tokenizer(row["text"])["input_ids"]) for row in rows[start : start + 4]]
        in_file_order += sum(max(lengths) - length for length in lengths)
    assert grouped < in_file_order / 4
    alone = evaluation.evaluate(
        model,
        [
            evaluation.loss(batch, name=str(i))
            for i, batch in enumerate(one_by_one(tmp_path / "texts.jsonl", tokenizer))
        ],
        progress=False,
    )
    assert [alone[str(i)].documents[0] for i in range(20)] == list(found.documents)
    assert [alone[str(i)].scores[0] for i in range(20)] == pytest.approx(list(found.scores), abs=1e-4)


def one_by_one(path, tokenizer):
    return [[batch] for batch in loader(path, tokenizer, batch_size=1, progress=False)]


def test_groups_are_kept_in_the_certificate(home, texts):
    groups = {"loss": [f"passage {i // 4}" for i in range(64)]}
    certificate = certify(home, "bad", evaluation.loss(texts), groups=groups)
    [row] = certificate.tasks
    assert row.method == "cluster-t"
    assert row.groups == tuple(i // 4 for i in range(64))
    certificate.verify()
    with pytest.raises(EvaluationError, match=r"`groups` names 'other', which is no task; the tasks are \['loss'\]"):
        certify(home, "bad", evaluation.loss(texts), groups={"other": [1] * 64})


def test_forged_figures_do_not_verify(home, texts):
    certificate = certify(home, "bad", evaluation.loss(texts))
    [row] = certificate.tasks
    for forged, message in [
        (replace(certificate, tasks=(replace(row, candidate_mean=0.0),)), "loss's candidate_mean are not those"),
        (replace(certificate, verdict="PASS"), "its scores give FAIL, it says PASS"),
        (replace(certificate, lower=0.0), "its lower is not that of loss"),
    ]:
        content = {key: value for key, value in forged.to_dict().items() if key != "sha256"}
        with pytest.raises(EvaluationError, match=message):
            replace(forged, sha256=digest(content)).verify()


def test_a_base_that_does_not_fit_is_named(home, texts, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **shape)).save_pretrained(tmp_path / "other")
    with pytest.raises(
        EvaluationError, match=r"good' does not fit .*other': its tensor .* shape \(4, 32\), .* needs \(4, 16\)"
    ):
        evaluation.certify(tmp_path / "other", home / "good", home / "bad", tasks=evaluation.loss(texts), margin=0.1)
    with pytest.raises(EvaluationError, match="nowhere' cannot be loaded"):
        evaluation.certify(tmp_path / "nowhere", home / "good", home / "bad", tasks=evaluation.loss(texts), margin=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0}, "`margin` must be a finite number above 0; got 0"),
        ({"margin": float("nan")}, "`margin` must be a finite number above 0"),
        ({"alpha": 0.7}, r"`alpha` must be a number in \(0, 0.5\]; got 0.7"),
        ({"tasks": []}, "must have at least one task"),
    ],
)
def test_bad_arguments(home, texts, options, message):
    settings = {"tasks": evaluation.loss(texts), "margin": 0.1} | options
    with pytest.raises(ValueError, match=message):
        evaluation.certify(home / "base", home / "good", home / "bad", **settings)


@pytest.mark.parametrize("place", ['"margin": 0.05', '"verdict": "FAIL"', '"seed', '"lower": -'])
def test_a_certificate_with_one_changed_byte_does_not_verify(home, texts, tmp_path, place):
    certificate = certify(home, "bad", evaluation.loss(texts))
    certificate.save(tmp_path / "certificate.json")
    text = (tmp_path / "certificate.json").read_text()
    kept = evaluation.read_certificate(tmp_path / "certificate.json")
    assert kept == certificate
    kept.verify()
    if place not in text:
        place = '"created": "2'
    i = text.index(place) + len(place) - 1
    swapped = {"5": "6", '"': '"', "-": " ", "2": "3", "d": "b"}[text[i]]
    if swapped == text[i]:
        i, swapped = i - 1, "X"
    (tmp_path / "changed.json").write_text(text[:i] + swapped + text[i + 1 :])
    with pytest.raises(EvaluationError, match=r"does not verify|is not a certificate"):
        evaluation.read_certificate(tmp_path / "changed.json").verify()


@pytest.mark.slow
def test_the_page_and_the_card_escape_names(home, texts, tmp_path):
    certificate = certify(home, "bad", evaluation.loss(texts, name="<script>alert(1)</script>"))
    page = certificate.to_html(tmp_path / "deep" / "certificate.html")
    assert "<script>" not in page
    assert (tmp_path / "deep" / "certificate.html").read_text() == page
    assert certificate.sha256 in certificate.to_model_card()
    assert certificate.plot().axes
    assert len(repr(certificate)) < 1500


@pytest.mark.slow
def test_a_plan_says_what_a_verdict_takes(home, texts):
    plan = certify(home, "bad", evaluation.loss(texts), margin=0.01, plan=True)
    [row] = plan.tasks
    assert row["documents_scored"] == 50
    assert row["documents_needed"] > 50
    assert row["minutes"] > 0


@SLOW
def test_the_commands(home, questions, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "lorakit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    common = ("--base", home / "base", "--task", questions)
    done = run(
        "certify", home / "good", home / "same", *common, "--margin", "0.05", "--out", tmp_path / "c.json", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "PASS"
    done = run("certify", "--verify", tmp_path / "c.json")
    assert done.returncode == 0
    assert "PASS" in done.stdout
    done = run("certify", home / "good", home / "same", *common, "--margin", "0.05", "--limit", "20")
    assert done.returncode == 3, done.stderr
    done = run("certify", home / "good", home / "nowhere", *common, "--margin", "0.05")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = run("certify", home / "good", *common, "--margin", "0.05")
    assert done.returncode == 2
    done = run("evaluate", home / "good", home / "bad", *common, "--limit", "12", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {str(home / "good"), str(home / "bad")}


@SLOW
def test_the_command_that_finds_the_smallest(home, questions, tmp_path):
    rows = [{"text": f"document {i} " + "and more " * (i % 7)} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "lorakit", "compress", home / "good", tmp_path / "out"]
        return subprocess.run([*map(str, [*command, *arguments])], capture_output=True, text=True, timeout=300)

    common = ("--smallest", "--base", home / "base", "--task", tmp_path / "texts.jsonl", "--margin")
    done = run(*common, "1000", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 1
    assert (tmp_path / "out" / "lorakit_certificate.json").exists()
    # No accuracy can PASS on 8 questions at one point.
    done = run("--smallest", "--base", home / "base", "--task", questions, "--margin", "0.01", "--limit", "8")
    assert done.returncode in (1, 3), done.stderr
    assert "Nothing is written" in done.stdout
    assert run("--smallest", "--base", home / "base").returncode == 2
    assert run("--max-rank", "2", "--margin", "0.1").returncode == 2
