"""A tiny model with a tokenizer of characters, adapters for it, and documents."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

# The words that each answer is one of; the first is what `trained` prefers.
LETTERS = [chr(ord("a") + i) for i in range(26)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with base/, and the adapters good/, same/ (a copy), bad/ (a third of its modules damaged)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **shape))
    base.lm_head.weight.data *= 40  # so that what follows depends on what precedes
    base.save_pretrained(home / "base")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0], pad_token=letters[0])
    wrapped.save_pretrained(home / "base")

    def write(name, damage=0.0):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(home / "base"), config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
                    if "down_proj" in parameter_name:
                        parameter.add_(damage * torch.randn_like(parameter))
        model.save_pretrained(home / name)

    write("good")
    write("same")
    write("bad", damage=3.0)
    return home


@pytest.fixture(scope="module")
def questions(home):
    """A file of 120 questions, each of four choices."""
    rows = [
        {
            "question": f"which letter follows {LETTERS[i % 26]} {i} times?",
            "choices": [LETTERS[(i + j) % 26] * (1 + j % 2) for j in range(4)],
            "answer": i % 4,
        }
        for i in range(120)
    ]
    path = home / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def texts(home):
    """Batches of eight documents of twelve tokens, 64 in all, drawn from the adapter good/."""
    torch.manual_seed(3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "good").eval()
    ids = model.generate(
        input_ids=torch.randint(1, 256, (64, 2)),
        attention_mask=torch.ones(64, 2, dtype=torch.long),
        do_sample=True,
        top_k=0,
        min_new_tokens=10,
        max_new_tokens=10,
        suppress_tokens=[0],
    )
    return [{"input_ids": part, "labels": part} for part in ids.split(8)]
