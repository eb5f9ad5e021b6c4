"""Roles by name, on the real module names of transformers' models."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.tuners.roles import layer_of, role_of

ATTENTION = {"query", "key", "value", "output"}
LLAMA_LIKE = ATTENTION | {"gate", "up", "down"}
PLAIN = ATTENTION | {"up", "down"}
FUSED = {"fused_qkv", "output", "up", "down"}
ONE_LAYER = {"num_hidden_layers": 1}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}

FAMILIES = [
    ("LlamaConfig", "LlamaForCausalLM", ONE_LAYER, LLAMA_LIKE),
    ("Qwen2Config", "Qwen2ForCausalLM", ONE_LAYER, LLAMA_LIKE),
    ("MistralConfig", "MistralForCausalLM", ONE_LAYER, LLAMA_LIKE),
    ("GemmaConfig", "GemmaForCausalLM", ONE_LAYER, LLAMA_LIKE),
    ("PhiConfig", "PhiForCausalLM", ONE_LAYER, PLAIN),
    (
        "Phi3Config",
        "Phi3ForCausalLM",
        ONE_LAYER | {"pad_token_id": 0},
        {"fused_qkv", "fused_gate_up", "output", "down"},
    ),
    ("BertConfig", "BertModel", ONE_LAYER, PLAIN),
    ("RobertaConfig", "RobertaModel", ONE_LAYER, PLAIN),
    ("ViTConfig", "ViTModel", ONE_LAYER, PLAIN),
    ("DebertaV2Config", "DebertaV2Model", ONE_LAYER, PLAIN),
    ("T5Config", "T5ForConditionalGeneration", {"num_layers": 1}, PLAIN),
    ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 1}, FUSED),
    ("OPTConfig", "OPTForCausalLM", ONE_LAYER, PLAIN),
    ("FalconConfig", "FalconForCausalLM", ONE_LAYER, FUSED),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", ONE_LAYER, FUSED),
    ("WhisperConfig", "WhisperForConditionalGeneration", {"encoder_layers": 1, "decoder_layers": 1}, PLAIN),
    ("DistilBertConfig", "DistilBertModel", {"n_layers": 1}, PLAIN),
    ("AlbertConfig", "AlbertModel", ONE_LAYER, PLAIN),
    ("ModernBertConfig", "ModernBertModel", ONE_LAYER, {"fused_qkv", "output", "fused_gate_up", "down"}),
]


@pytest.mark.parametrize(("config", "model", "settings", "roles"), FAMILIES, ids=[family[1] for family in FAMILIES])
def test_roles_in_a_family(config, model, settings, roles):
    with torch.device("meta"):
        network = getattr(transformers, model)(getattr(transformers, config)(**settings))
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    in_layers = [name for name in linear if layer_of(name) is not None or "albert_layers" in name]
    assert {role_of(name) for name in in_layers} == roles
    for name in set(linear) - set(in_layers):
        assert role_of(name) is None, name


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.11.self_attn.q_proj", "query", 11),
        ("encoder.block.3.layer.0.SelfAttention.v", "value", 3),
        ("transformer.h.2.attn.c_attn", "fused_qkv", 2),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "output", None),
        ("lm_head", None, None),
        ("q_proj", "query", None),
        ("model.layers.0.mixer.in_proj", None, 0),
        ("my_query_thing", None, None),
        ("", None, None),
    ],
)
def test_role_and_layer_of_names(name, role, layer):
    assert role_of(name) == role
    assert layer_of(name) == layer or layer is None
