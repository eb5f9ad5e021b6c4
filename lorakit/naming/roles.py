"""A module's role (query, key, value, output, gate, up, down) and layer, from its name.

Covers the names used in transformers (5.x), diffusers and timm.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Role = Literal["query", "key", "value", "output", "gate", "up", "down", "fused_qkv", "fused_gate_up"]
ROLES: tuple[Role, ...] = get_args(Role)

# The roles whose output is added to the residual stream.
RESIDUAL_WRITING: tuple[Role, ...] = ("output", "down")

# Patterns for the end of a module's dotted name. The first match counts, so patterns with the parent's name come first.
_PATTERNS: tuple[tuple[str, Role], ...] = (
    # BERT, RoBERTa, ELECTRA, ViT (before transformers 5): dense layers told apart by their parents
    (r"attention\.output\.dense", "output"),
    (r"intermediate\.dense", "up"),
    (r"output\.dense", "down"),
    # wav2vec 2, HuBERT and their like
    (r"(?:feed_forward|ffn\d)\.intermediate_dense", "up"),
    (r"(?:feed_forward|ffn\d)\.output_dense", "down"),
    (r"self_attn\.linear_out", "output"),
    # RWKV's feed-forward uses the names of its attention
    (r"feed_forward\.receptance", "gate"),
    (r"feed_forward\.key", "up"),
    (r"feed_forward\.value", "down"),
    (r"attention\.output", "output"),
    # GPT-2, GPT-BigCode
    (r"attn\.c_proj", "output"),
    (r"mlp\.c_proj", "down"),
    (r"mlp\.c_fc", "up"),
    # Falcon, GPT-NeoX, BLOOM, Phi, MPT
    (r"(self_attention|self_attn|attention|attn)\.dense", "output"),
    (r"(?:query_key_value|c_attn|W_?qkv|(?:\w+_)?qkv(?:z|_proj|_linear|_mlp_proj)?)", "fused_qkv"),
    (r"gate_up_proj", "fused_gate_up"),
    # DeBERTa v1 fuses query, key and value in `attention.self.in_proj`; Mamba's `in_proj` is something else
    (r"attention\.self\.in_proj", "fused_qkv"),
    # T5's attention (SelfAttention, EncDecAttention) and feed-forward (DenseReluDense)
    (r"(?:\w*Attention|attn)\.o", "output"),
    (r"Dense\w*\.wo", "down"),
    (r"Dense\w*\.wi_0", "gate"),
    (r"Dense\w*\.wi(?:_1)?", "up"),
    # ModernBERT
    (r"attn\.Wo", "output"),
    (r"mlp\.Wi", "fused_gate_up"),
    (r"mlp\.Wo", "down"),
    # timm, and vision towers of transformers
    (r"attn\.proj", "output"),
    # diffusers; add_* belong to the text stream in joint attention
    (r"(?:to_out(?:\.0)?|to_add_out)", "output"),
    (r"(?:to_q|to_query|add_q_proj)", "query"),
    (r"(?:to_k|to_key|add_k_proj)", "key"),
    (r"(?:to_v|to_value|add_v_proj)", "value"),
    (r"ff(?:_context)?\.net\.2", "down"),
    # names that are clear without their parent
    (r"(?:q_proj|query_proj|query|query_global|q_lin|q_linear|linear_q|q_attn|q_head|q|wq|Wq)", "query"),
    (r"(?:k_proj|key_proj|key|key_global|k_lin|k_linear|linear_k|k_head|k|wk|Wk)", "key"),
    (r"(?:v_proj|value_proj|value|value_global|v_lin|v_linear|linear_v|v_head|v|wv|Wv)", "value"),
    (r"(?:o_proj|out_proj|out_lin)", "output"),
    (r"(?:gate_proj|w1)", "gate"),
    (r"(?:up_proj|fc1|fc_in|lin1|w3|dense_h_to_4h|ffn)", "up"),
    (r"(?:down_proj|fc2|fc_out|lin2|w2|dense_4h_to_h|ffn_output)", "down"),
)
_COMPILED = tuple((re.compile(rf"(?:.*\.)?{pattern}"), role) for pattern, role in _PATTERNS)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d+)(?:\.|$)")


def role_of(module_name: str) -> Role | None:
    """The role of a module, from its dotted name; None if the name is unknown.

    Example:
        >>> role_of("model.layers.3.self_attn.q_proj"), role_of("transformer.h.0.attn.c_attn"), role_of("lm_head")
        ('query', 'fused_qkv', None)
    """
    for pattern, role in _COMPILED:
        if pattern.fullmatch(module_name):
            return role
    return None


def layer_of(module_name: str) -> int | None:
    """The index of the transformer layer that contains a module, from its dotted name; None outside the layers.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj")
        3
    """
    match = _LAYER.search(module_name)
    return None if match is None else int(match.group(1))


def layer_prefix(module_name: str) -> str | None:
    """The part of a module's dotted name up to its layer's index; None outside the layers.

    Example:
        >>> layer_prefix("model.layers.3.self_attn.q_proj")
        'model.layers.3'
    """
    match = _LAYER.search(module_name)
    return None if match is None else module_name[: match.end(1)]


def group_of(module_name: str) -> str:
    """The module's role, or the last component of its name if it has none."""
    return role_of(module_name) or module_name.rpartition(".")[2]
