"""The recipes of benchmarks/recipes: each is read, has the paper's values, and runs in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classified import sentences, write_bert, write_images, write_lines, write_vit

import lorakit
from lorakit import experiments
from lorakit.evaluation import LoadOptions, classification, loss
from lorakit.experiments._bench_file import read_either_file
from lorakit.experiments._bench_settings import check_probe
from lorakit.experiments._compare_settings import check_methods, check_rates, check_train

RECIPES = sorted((Path(__file__).parents[2] / "benchmarks" / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
TABLE_7 = {  # SpecLoRA's Table 7: length, batch, learning rate, epochs
    "mnli": (256, 32, 8e-4, 7),
    "sst2": (128, 32, 4e-4, 24),
    "cola": (64, 32, 1e-3, 25),
    "qqp": (320, 32, 5e-4, 5),
    "qnli": (512, 16, 5e-4, 5),
    "rte": (320, 32, 1.2e-3, 50),
    "mrpc": (320, 32, 1e-4, 30),
    "stsb": (128, 32, 1.8e-3, 25),
}


def read(name, home, monkeypatch):
    """A recipe's arguments, in a directory that has the files which tasks look for."""
    monkeypatch.chdir(home)
    for task in ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"):
        file = home / "dataset" / task / "test.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{"instruction": "?", "output": "true"}]))
    return read_either_file(next(path for path in RECIPES if path.stem == name))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_read_and_its_configs_can_be_made(name, tmp_path, monkeypatch):
    function, arguments = read(name, tmp_path, monkeypatch)
    text = next(path for path in RECIPES if path.stem == name).read_text()
    assert f"lorakit bench {name}.yaml" in text
    if function == "bench":
        assert check_probe(arguments["probe"])["r"] == 64
        return
    rates = check_rates(arguments.get("learning_rate"), arguments.get("learning_rates"))
    methods = check_methods(arguments["methods"], rates, arguments["model"])
    check_train(arguments["train"], arguments["model"])
    assert all(method.learning_rates for method in methods)
    assert len(arguments["seeds"]) >= 3


@pytest.mark.parametrize("task", TABLE_7)
def test_glue_has_the_values_of_table_7(task, tmp_path, monkeypatch):
    _, arguments = read(f"speclora_glue_{task}", tmp_path, monkeypatch)
    found = (arguments["train"]["length"], arguments["batch_size"], arguments["learning_rate"], arguments["epochs"])
    assert found == TABLE_7[task]
    assert (arguments["schedule"], arguments["warmup_ratio"]) == ("linear", 0.1)
    for fields in arguments["methods"].values():
        assert (fields.get("r", fields.get("target_r")), fields["lora_alpha"]) == (2, 4)
    assert arguments["methods"]["SpecLoRA"]["k"] == 200
    assert {one.length for one in arguments["tasks"]} == {TABLE_7[task][0]}


def test_commonsense_has_the_values_of_table_5(tmp_path, monkeypatch):
    _, arguments = read("speclora_commonsense_llama3", tmp_path, monkeypatch)
    assert (arguments["batch_size"], arguments["epochs"], arguments["learning_rate"]) == (16, 3, 3e-4)
    for fields in arguments["methods"].values():
        assert (fields.get("r", fields.get("target_r")), fields["lora_alpha"], fields["lora_dropout"]) == (16, 32, 0.05)
        assert fields["target_modules"] == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert len(arguments["tasks"]) == 8


@pytest.mark.parametrize(
    ("family", "length", "batch"),
    [("math", 1024, 768), ("commonsense", 2048, 256), ("instruction", 2048, 256), ("code", 4096, 192)],
)
def test_spectral_surgery_has_the_values_of_table_6(family, length, batch, tmp_path, monkeypatch):
    _, arguments = read(f"spectral_surgery_{family}", tmp_path, monkeypatch)
    assert (arguments["train"]["length"], arguments["batch_size"], arguments["epochs"]) == (length, batch, 3)
    assert arguments["methods"]["LoRA"] == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }


def test_gradiences_bench_has_its_settings(tmp_path, monkeypatch):
    function, arguments = read("gradience_gsm8k", tmp_path, monkeypatch)
    assert function == "bench"
    assert (arguments["steps"], arguments["learning_rate"], arguments["seeds"]) == (1200, 5e-5, [42, 123, 456])
    assert (arguments["probe"]["r"], arguments["probe"]["lora_alpha"]) == (64, 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models of each kind, and data for them."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("recipes")
    write_bert(home / "bert", max_position_embeddings=160)
    write_bert(home / "deberta")
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
    DebertaV2Model(DebertaV2Config(vocab_size=32, **shape, **more)).save_pretrained(home / "deberta")
    write_vit(home / "vit")
    core = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(30)}}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(home / "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **shape)).save_pretrained(home / "llama")
    rows = [{"text": row["sentence"], "text_pair": "w3", "label": row["label"]} for row in sentences(48)]
    write_lines(home / "labelled.jsonl", rows[:32])
    write_lines(home / "labelled_test.jsonl", rows[32:])
    write_lines(home / "texts.jsonl", [{"text": row["text"]} for row in rows[:32]])
    write_lines(home / "texts_test.jsonl", [{"text": row["text"]} for row in rows[32:]])
    write_images(home / "images", 16)
    write_images(home / "images_test", 8, seed=1)
    return home


SMALL = {
    "speclora_cola_minilm": "bert",
    "speclora_rte_minilm": "bert",
    "speclora_cola_minilm_sweeps": "bert",
    "speclora_glue_mnli": "deberta",
    "speclora_vtab_vit": "vit",
    "speclora_commonsense_llama3": "llama",
    "lora_lens_alpaca": "llama",
    "spectral_surgery_math": "llama",
}
DATA = {"bert": "labelled.jsonl", "deberta": "labelled.jsonl", "vit": "images", "llama": "texts.jsonl"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SpecLoRA. `k`")
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_runs_in_small(name, models, tmp_path, monkeypatch):
    """Its methods and options, with a tiny model, a few documents and a few steps."""
    function, arguments = read(name, tmp_path, monkeypatch)
    kind = SMALL[name]
    train = models / DATA[kind]
    test = models / DATA[kind].replace("images", "images_test").replace(".jsonl", "_test.jsonl")
    length = min(16, arguments["train"].get("length", 16))
    for fields in arguments["methods"].values():
        if isinstance(fields.get("from_probe"), dict):
            fields["from_probe"] |= {"num_examples": 4, "train_steps": 1}
        if kind != "llama" and "k" in fields:
            fields["k"] = min(fields["k"], 32)
    changed = {
        "base": models / kind,
        "train": {"source": train} if kind == "vit" else {"source": train, "length": length},
        "tasks": loss(test, length=length) if kind == "llama" else classification(test, length=length),
        "directory": tmp_path / "out",
        "steps": 6,
        "epochs": None,
        "batch_size": 4,
        "seeds": [0, 1, 2],
        "save_adapters": False,
        "options": LoadOptions(device="cpu"),
    }
    if "learning_rates" in arguments:
        changed |= {"learning_rates": arguments["learning_rates"][:2], "validation": 4}
        arguments["methods"] = dict(list(arguments["methods"].items())[:1] + list(arguments["methods"].items())[-3:])
    report = getattr(experiments, function)(**arguments | changed, progress=False)
    report.verify()
    assert [method.name for method in report.methods] == list(arguments["methods"])
    assert isinstance(report, lorakit.experiments.MethodsReport)
