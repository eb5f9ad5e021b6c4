"""What travels with the weights, and what is replaced only when asked."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lorakit._version import __version__
from lorakit.adapters import open_adapter
from lorakit.adapters.companions import COMPANIONS, companions_of, written_by_lorakit
from lorakit.compress import truncate
from lorakit.errors import LorakitError, OverwriteError
from lorakit.export import to_lora
from lorakit.merging import merge

WEIGHTS = "adapter_model.safetensors"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
WRITERS = {
    "compress": lambda model, source, out, **options: truncate(source, out, max_rank=2, **options),
    "merge": lambda model, source, out, **options: merge([source, source], out, **options),
    "export": lambda model, source, out, **options: to_lora(source, out, **options),
    "export of a model": lambda model, source, out, **options: to_lora(model, out, source=source, **options),
}


@pytest.fixture
def adapter(tiny_llama, randomize, base_model, tmp_path):
    """An adapter with a tokenizer of its own, one token larger than the base model's, and a chat template."""

    def make(name="adapter", seed=2):
        base = tiny_llama()
        base.config._name_or_path = "org/base"
        model = randomize(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), seed=seed)
        model.peft_config["default"].base_model_name_or_path = "org/base"
        model.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        tokenizer.add_tokens([f"<{name}>"])
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


@pytest.mark.parametrize("writer", WRITERS)
def test_tokenizer_chat_template_and_card_travel(adapter, tmp_path, writer):
    model, source = adapter()
    card = (source / "README.md").read_text()
    WRITERS[writer](model, source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<adapter>" in tokenizer.get_vocab()
    assert tokenizer.chat_template == TEMPLATE
    copied = [name for name in COMPANIONS if (source / name).exists()]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(copied)
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith(card.rstrip())
    change = text[len(card.rstrip()) :]
    assert "## Changes made by lorakit" in change
    assert f"* `{writer.partition(' ')[0]}` (" in change
    assert f"(lorakit {__version__})" in change
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/base"


def test_each_change_is_one_more_line(adapter, tmp_path):
    _, source = adapter()
    truncate(source, tmp_path / "cut", max_rank=2)
    merge([tmp_path / "cut", source], tmp_path / "merged")
    section = (tmp_path / "merged" / "README.md").read_text().partition("## Changes made by lorakit")[2]
    assert [line.split()[1] for line in section.splitlines() if line.startswith("*")] == ["`compress`", "`merge`"]
    assert section.count("sha256") == 1


def test_a_change_is_added_to_its_section(adapter, tmp_path):
    _, source = adapter()
    truncate(source, tmp_path / "cut", max_rank=3)
    card = tmp_path / "cut" / "README.md"
    card.write_text(card.read_text() + "\n## Licence\n\nMIT\n")
    report = truncate(open_adapter(tmp_path / "cut"), tmp_path / "out", max_rank=2)
    before, _, after = (tmp_path / "out" / "README.md").read_text().partition("## Licence")
    assert after == "\n\nMIT\n"
    section = before.partition("## Changes made by lorakit")[2].strip().splitlines()
    assert [line.partition(" (")[0] for line in section[:2]] == ["* `compress`"] * 2
    assert "<adapter>" in AutoTokenizer.from_pretrained(report.path).get_vocab()


def test_a_merge_names_its_sources_without_their_paths(adapter, tmp_path):
    _, source = adapter()
    merge([source, source], tmp_path / "out", weights=[0.25, 0.75])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`merge` (linear): 0.25 · adapter + 0.75 · adapter, at rank 8, 100.0000% of the merge's energy kept." in card
    assert str(tmp_path) not in card.partition("## Changes made by lorakit")[2]


def test_a_model_in_memory_gets_a_card_of_its_own(adapter, tmp_path):
    model, _ = adapter()
    to_lora(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert "# A LoRA adapter of org/base" in card.text
    assert not [name for name in COMPANIONS if (tmp_path / "out" / name).exists()]


def test_files_that_differ_between_sources_are_named(adapter, tmp_path):
    _, first = adapter("first")
    _, second = adapter("second", seed=3)
    report = merge([first, second], tmp_path / "out")
    [finding] = [finding for finding in report.findings if finding.code == "companions_differ"]
    assert "tokenizer.json" in finding.message
    assert "chat_template.jinja" not in finding.message
    assert "<first>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@pytest.mark.parametrize("nested", [False, True])
def test_directories_of_chat_templates_travel(adapter, tmp_path, nested):
    _, first = adapter("first")
    _, second = adapter("second")
    for source in (first, second):
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "rag.jinja").write_text(TEMPLATE)
    if nested:
        (second / "additional_chat_templates" / "rag.jinja").write_text("other")
    companions = companions_of([first, second])
    differing = companions.findings[0].message if companions.findings else ""
    assert ("additional_chat_templates" in differing) == nested
    truncate(first, tmp_path / "out", max_rank=2)
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_command_runs_again_but_other_adapters_are_safe(adapter, tmp_path, writer):
    model, source = adapter()
    write = WRITERS[writer]
    write(model, source, tmp_path / "out")
    assert written_by_lorakit(tmp_path / "out")
    digest = hashlib.sha256((tmp_path / "out" / WEIGHTS).read_bytes()).hexdigest()
    assert f"with sha256 {digest} -->" in (tmp_path / "out" / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write(model, source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    _, other = adapter("other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(OverwriteError, match=r"`out` '.*other' has an adapter that lorakit did not write\. Pass"):
        write(model, source, other)
    with pytest.raises(FileExistsError, match="is the directory of the adapter itself"):
        write(model, source, source)
    assert issubclass(OverwriteError, LorakitError)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    write(model, source, other, overwrite=True)
    assert written_by_lorakit(other)


def test_what_is_trained_further_is_no_longer_lorakit_s(adapter, tiny_llama, randomize, tmp_path):
    _, source = adapter()
    out = tmp_path / "out"
    to_lora(source, out)
    trained = randomize(PeftModel.from_pretrained(tiny_llama(), out, is_trainable=True), seed=9)
    trained.save_pretrained(out)
    assert "lorakit wrote" in (out / "README.md").read_text()
    assert not written_by_lorakit(out)
    with pytest.raises(OverwriteError):
        to_lora(source, out)


def test_an_edited_adapter_is_known_by_its_record(adapter, tmp_path):
    _, source = adapter()
    digest = hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    record = source / "lorakit_surgery.json"
    record.write_text(json.dumps({"weights_sha256": digest, "edits": []}))
    assert written_by_lorakit(source)
    tensors = load_file(source / WEIGHTS)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, source / WEIGHTS)
    assert not written_by_lorakit(source)
    for text in ("no json", "[]", "{}"):
        record.write_text(text)
        assert not written_by_lorakit(source)


def test_pickled_weights_are_an_adapter_too(adapter, tmp_path):
    _, source = adapter()
    (tmp_path / "old").mkdir()
    torch.save(load_file(source / WEIGHTS), tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(OverwriteError, match="did not write"):
        truncate(source, tmp_path / "old", max_rank=2)
    (tmp_path / "empty").mkdir()
    truncate(source, tmp_path / "empty", max_rank=2)
