"""Roles by name, on the real module names of transformers' models."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.naming.roles import layer_of, layer_prefix, role_of

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
        ("transformer_blocks.0.attn.add_q_proj", "query", None),
        ("transformer_blocks.0.attn.add_v_proj", "value", None),
        ("transformer_blocks.0.attn.to_add_out", "output", None),
        ("transformer_blocks.0.ff.net.2", "down", None),
        ("transformer_blocks.0.ff.net.0.proj", None, None),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "fused_qkv", None),
        ("movq.to_query", "query", None),
        ("transformer.h.1.multi_head_attention.Wq", "query", 1),
        ("transformer.h.1.multi_head_attention.Wv", "value", 1),
        ("encoder.layer.0.attention.self.query_global", "query", 0),
        ("encoder.layer.0.attention.self.value_global", "value", 0),
        ("encoder.layers.0.self_attn.linear_q", "query", 0),
        ("encoder.layers.0.self_attn.linear_v", "value", 0),
        ("encoder.layers.0.self_attn.linear_out", "output", 0),
        ("encoder.layers.0.feed_forward.intermediate_dense", "up", 0),
        ("encoder.layers.0.ffn2.output_dense", "down", 0),
        ("encoder.blocks.0.1.attention.v_head", "value", 0),
        ("model.layers.0.linear_attn.in_proj_qkvz", "fused_qkv", 0),
        ("visual.blocks.3.attn.qkv", "fused_qkv", 3),
        ("visual.blocks.3.attn.proj", "output", 3),
        ("rwkv.blocks.1.attention.value", "value", 1),
        ("rwkv.blocks.1.feed_forward.key", "up", 1),
        ("rwkv.blocks.1.feed_forward.value", "down", 1),
        ("quantizer.project_q", None, None),
        ("lm_head", None, None),
        ("q_proj", "query", None),
        ("model.layers.0.mixer.in_proj", None, 0),
        ("my_query_thing", None, None),
        ("", None, None),
    ],
)
def test_role_and_layer_of_names(name, role, layer):
    assert role_of(name) == role
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("model.layers.1.self_attn.q_proj", "model.layers.1"),
        ("model.layers.1.mlp.experts.3.w1", "model.layers.1"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0"),
        ("decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0"),
        ("transformer.h.11", "transformer.h.11"),
        ("lm_head", None),
    ],
)
def test_layer_prefixes(name, prefix):
    assert layer_prefix(name) == prefix
