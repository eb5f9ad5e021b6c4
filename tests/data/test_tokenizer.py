"""Which tokenizer and which chat template are taken: the adapter's before the base's."""

from __future__ import annotations

import pytest
from chats import MARKED, PLAIN
from transformers import AutoTokenizer

from lorakit.data import tokenizer_for
from lorakit.errors import DataError


@pytest.fixture
def base(make_tokenizer, tmp_path):
    make_tokenizer(PLAIN).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere/at-all"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path / "adapter"


def test_an_adapter_without_a_tokenizer_has_the_base_s(base, adapter):
    found = tokenizer_for(adapter, base)
    assert found.chat_template == PLAIN
    assert found.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_the_adapter_s_tokenizer_and_template_win(make_tokenizer, base, adapter):
    tokenizer = make_tokenizer(MARKED)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    for path in (adapter, str(adapter), adapter / "adapter_model.safetensors"):
        found = tokenizer_for(path, base)
        assert found.chat_template == MARKED
        assert "<new>" in found.get_vocab()
    assert tokenizer_for(adapter).chat_template == MARKED  # no base needed


def test_the_adapter_s_template_wins_alone_too(base, adapter):
    (adapter / "chat_template.jinja").write_text(MARKED, encoding="utf-8")
    assert tokenizer_for(adapter, base).chat_template == MARKED


def test_a_tokenizer_without_a_template_gets_the_base_s(make_tokenizer, base, adapter):
    make_tokenizer().save_pretrained(adapter)
    assert tokenizer_for(adapter, base).chat_template == PLAIN
    assert tokenizer_for(adapter).chat_template is None


def test_no_tokenizer_at_all(adapter):
    with pytest.raises(DataError, match=r"There is no tokenizer beside '.*adapter'\. Name the base model, or save"):
        tokenizer_for(adapter)
    with pytest.raises(DataError, match="The tokenizer of .nowhere/at-all. cannot be loaded: .*huggingface"):
        tokenizer_for("nowhere/at-all")
