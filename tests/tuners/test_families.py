"""Both tuners on tiny random models of many families: built, trained for two steps, saved, loaded, merged, exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
import transformers
from closeness import TOLERANCE, assert_close_outputs
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import Tensor, nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.export import to_lora

R, R_Q, R_V = 6, 2, 5
K = 8
# Of a trained tensor's largest gradient, relative to the largest of all: a gradient that is 0 but for rounding is below
# 1e-7, on one processor or another, and the smallest of the others 4e-5.
LEAST_GRADIENT = 2e-6


@dataclass(frozen=True)
class Family:
    """A family's tiny model, what it is called with, and the modules that the tuners adapt in it.

    `ranks` has what FisherLoRA adapts, and with which rank, by the last components of the names; `count` is their
    number. Where it cannot choose these by itself, `refusal` is the end of what it says, and the names in `ranks` are
    given as its targets; where it leaves fused projections alone, `left_out` is the first that it warns of. `idle` is a
    module that has no part in the output.
    `spec_targets` are given to SpecLoRA where PEFT has no default for the family.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    ranks: Mapping[str, int]
    count: int
    spec_targets: list[str] | None = None
    refusal: str | None = None
    left_out: str | None = None
    idle: str | None = None
    output: str = "logits"

    def build(self) -> nn.Module:
        library = diffusers if hasattr(diffusers, self.model) else transformers
        cls = getattr(library, self.model)
        model = cls(**self.settings) if library is diffusers else cls(cls.config_class(**self.settings))
        # As initialized, many are so small that gradients through attention vanish.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2, generator=generator)
        return model.eval()

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return getattr(model.eval()(**self.inputs()), self.output)

    def loss(self, model: nn.Module) -> Tensor:
        outputs = model(**self.inputs())
        loss = getattr(outputs, "loss", None)
        return getattr(outputs, self.output).square().mean() if loss is None else loss


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def tokens(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(4))


def language() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


def classified_text() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1])}


def text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def pictures(side: int = 8) -> dict[str, Any]:
    return {"pixel_values": draw(2, 3, side, side), "labels": torch.tensor([0, 1])}


def sound() -> dict[str, Any]:
    return {"input_values": draw(2, 400), "labels": torch.tensor([0, 1])}


def sequences() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=4), "labels": tokens(length=4)}


def picture_and_text() -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": draw(2, 3, 8, 8), "return_loss": True}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = BODY | IDS | {"vocab_size": 64, "max_position_embeddings": 64}
LLAMA = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
PICTURE = BODY | {"image_size": 8, "patch_size": 4, "num_labels": 2}
SOUND = BODY | {
    "num_labels": 2,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
GPT = IDS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}
T5 = {
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART = IDS | {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
MOE = LLAMA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

QV_PROJ = {"q_proj": R_Q, "v_proj": R_V}
QUERY_VALUE = {"query": R_Q, "value": R_V}
GIVEN = list(QV_PROJ)

DECODERS = [
    Family("llama", "LlamaForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("mistral", "MistralForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("qwen2", "Qwen2ForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("qwen3", "Qwen3ForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("gemma", "GemmaForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("gemma2", "Gemma2ForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("gemma3", "Gemma3ForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("phi", "PhiForCausalLM", TEXT, language, QV_PROJ, 4),
    Family(
        "phi3", "Phi3ForCausalLM", TEXT, language, {"qkv_proj": R}, 2, ["qkv_proj"], r"layers\.0\.self_attn\.qkv_proj"
    ),
    Family("gpt2", "GPT2LMHeadModel", GPT, language, {"c_attn": R}, 2, None, r"transformer\.h\.0\.attn\.c_attn"),
    Family(
        "gpt-bigcode",
        "GPTBigCodeForCausalLM",
        GPT,
        language,
        {"c_attn": R},
        2,
        None,
        r"transformer\.h\.0\.attn\.c_attn",
    ),
    Family("gptj", "GPTJForCausalLM", GPT | {"rotary_dim": 4}, language, QV_PROJ, 4),
    Family(
        "gpt-neo",
        "GPTNeoForCausalLM",
        TEXT | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        language,
        QV_PROJ,
        4,
    ),
    Family(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        TEXT,
        language,
        {"query_key_value": R},
        2,
        None,
        r"layers\.0\.attention\.query_key_value",
    ),
    Family(
        "codegen",
        "CodeGenForCausalLM",
        GPT | {"rotary_dim": 4, "n_head": 4},
        language,
        {"qkv_proj": R},
        2,
        None,
        r"h\.0\.attn\.qkv_proj",
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        language,
        QV_PROJ,
        4,
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        TEXT,
        language,
        {"query_key_value": R},
        2,
        None,
        r"h\.0\.self_attention\.query_key_value",
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        IDS | {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64},
        language,
        {"query_key_value": R},
        2,
        None,
        r"h\.0\.self_attention\.query_key_value",
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64},
        language,
        {"Wqkv": R},
        2,
        None,
        r"blocks\.0\.attn\.Wqkv",
    ),
    Family("cohere", "CohereForCausalLM", LLAMA, language, QV_PROJ, 4, GIVEN),
    Family("olmo2", "Olmo2ForCausalLM", LLAMA, language, QV_PROJ, 4, GIVEN),
    Family("starcoder2", "Starcoder2ForCausalLM", LLAMA, language, QV_PROJ, 4, GIVEN),
    Family("stablelm", "StableLmForCausalLM", LLAMA, language, QV_PROJ, 4),
    Family("ctrl", "CTRLLMHeadModel", GPT | {"dff": 24}, language, {"Wq": R_Q, "Wv": R_V}, 4, ["Wq", "Wv"]),
    Family("gpt-oss", "GptOssForCausalLM", MOE, language, QV_PROJ, 4, GIVEN),
    # Some layers have attention, the others linear attention, which fuses its projections.
    Family(
        "qwen3-next",
        "Qwen3NextForCausalLM",
        MOE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
        },
        language,
        QV_PROJ,
        2,
        GIVEN,
        left_out=r"model\.layers\.0\.linear_attn\.in_proj_qkvz",
    ),
    Family("granite", "GraniteForCausalLM", LLAMA, language, QV_PROJ, 4, GIVEN),
    Family("mixtral", "MixtralForCausalLM", MOE, language, QV_PROJ, 4),
    Family("qwen3-moe", "Qwen3MoeForCausalLM", MOE, language, QV_PROJ, 4, GIVEN),
    # Latent attention: one matrix makes keys and values, and both sides come in two factors.
    Family(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        MOE
        | {
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "head_dim": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        language,
        {"q_b_proj": R, "kv_b_proj": R},
        4,
        ["q_b_proj", "kv_b_proj"],
        "found no query and value",
    ),
    # No attention at all.
    Family(
        "mamba",
        "MambaForCausalLM",
        IDS | {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64},
        language,
        {"in_proj": R, "x_proj": R},
        4,
        ["in_proj", "x_proj"],
        "found no query and value",
    ),
    # Its receptance is a gate and no query; its feed-forward has a key and a value too, which are none.
    Family(
        "rwkv",
        "RwkvForCausalLM",
        IDS | {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "context_length": 16},
        language,
        {"attention.value": R_V, "attention.receptance": R, "feed_forward.value": R},
        6,
        None,
        "found no query and value",
    ),
]

ENCODERS = [
    Family("bert", "BertForSequenceClassification", TEXT, classified_text, QUERY_VALUE, 4),
    Family("roberta", "RobertaForMaskedLM", TEXT, language, QUERY_VALUE, 4),
    Family("xlm-roberta", "XLMRobertaForTokenClassification", TEXT, text, QUERY_VALUE, 4),
    Family("electra", "ElectraForMaskedLM", TEXT | {"embedding_size": 16}, language, QUERY_VALUE, 4),
    Family(
        "deberta",
        "DebertaForSequenceClassification",
        TEXT,
        classified_text,
        {"in_proj": R},
        2,
        None,
        r"layer\.0\.attention\.self\.in_proj",
    ),
    Family(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        TEXT,
        classified_text,
        {"query_proj": R_Q, "value_proj": R_V},
        4,
    ),
    Family(
        "distilbert",
        "DistilBertForSequenceClassification",
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_position_embeddings": 64},
        classified_text,
        {"q_lin": R_Q, "v_lin": R_V},
        4,
        ["q_lin", "v_lin"],
    ),
    # The two layers are one and the same module, so it is adapted once.
    Family(
        "albert",
        "AlbertForSequenceClassification",
        TEXT | {"embedding_size": 8},
        classified_text,
        QUERY_VALUE,
        2,
        list(QUERY_VALUE),
    ),
    Family(
        "modernbert",
        "ModernBertForMaskedLM",
        TEXT | {"cls_token_id": 1, "sep_token_id": 2},
        language,
        {"Wqkv": R},
        2,
        ["Wqkv"],
        r"layers\.0\.attn\.Wqkv",
    ),
    Family("mpnet", "MPNetForMaskedLM", TEXT, language, {"q": R_Q, "v": R_V}, 4, ["q", "v"]),
    Family(
        "longformer",
        "LongformerForMaskedLM",
        TEXT | {"attention_window": 4},
        lambda: language() | {"global_attention_mask": torch.tensor([[1, 0, 0, 0, 0, 0]] * 2)},
        QUERY_VALUE | {"query_global": R_Q, "value_global": R_V},
        8,
        list(QUERY_VALUE),
    ),
    Family(
        "funnel",
        "FunnelForMaskedLM",
        {
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1],
            "num_decoder_layers": 1,
            "vocab_size": 64,
        },
        language,
        {"q_head": R_Q, "v_head": R_V},
        4,
        ["q_head", "v_head"],
    ),
    Family("esm", "EsmForMaskedLM", TEXT | {"mask_token_id": 3}, language, QUERY_VALUE, 4, list(QUERY_VALUE)),
]

VISION_AND_SOUND = [
    Family("vit", "ViTForImageClassification", PICTURE, pictures, QV_PROJ, 4, GIVEN),
    Family("deit", "DeiTForImageClassification", PICTURE, pictures, QV_PROJ, 4, GIVEN),
    Family("beit", "BeitForImageClassification", PICTURE, pictures, QV_PROJ, 4, GIVEN),
    Family("dinov2", "Dinov2ForImageClassification", PICTURE, pictures, QV_PROJ, 4, GIVEN),
    Family(
        "swin",
        "SwinForImageClassification",
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        pictures,
        QV_PROJ,
        4,
        GIVEN,
    ),
    Family(
        "segformer",
        "SegformerForImageClassification",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "num_attention_heads": [1, 2],
            "num_encoder_blocks": 2,
            "decoder_hidden_size": 16,
            "mlp_ratios": [2, 2],
        },
        # Pictures of 8 pixels a side are one key to its attention, whose query then has no gradient.
        lambda: pictures(side=16),
        QV_PROJ,
        4,
        GIVEN,
    ),
    Family("wav2vec2", "Wav2Vec2ForSequenceClassification", SOUND, sound, QV_PROJ, 4, GIVEN),
    Family(
        "wav2vec2-bert",
        "Wav2Vec2BertForSequenceClassification",
        SOUND | {"feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3},
        lambda: {"input_features": draw(2, 6, 8), "labels": torch.tensor([0, 1])},
        {"linear_q": R_Q, "linear_v": R_V},
        4,
        ["linear_q", "linear_v"],
    ),
    Family("hubert", "HubertForSequenceClassification", SOUND, sound, QV_PROJ, 4, GIVEN),
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        BART | {"max_source_positions": 4, "max_target_positions": 16, "num_mel_bins": 8},
        lambda: {"input_features": draw(2, 8, 8), "labels": tokens(length=4)},
        QV_PROJ,
        6,
        GIVEN,
    ),
]

SEQUENCE_TO_SEQUENCE = [
    Family("t5", "T5ForConditionalGeneration", T5, sequences, {"q": R_Q, "v": R_V}, 6),
    Family("mt5", "MT5ForConditionalGeneration", T5, sequences, {"q": R_Q, "v": R_V}, 6),
    Family("bart", "BartForConditionalGeneration", BART, sequences, QV_PROJ, 6),
    Family("mbart", "MBartForConditionalGeneration", BART, sequences, QV_PROJ, 6, GIVEN),
    Family("marian", "MarianMTModel", BART, sequences, QV_PROJ, 6, GIVEN),
    Family("pegasus", "PegasusForConditionalGeneration", BART, sequences, QV_PROJ, 6, GIVEN),
]

CLIP = {"text_config": TEXT, "vision_config": BODY | {"image_size": 8, "patch_size": 4}, "projection_dim": 16}

SEVERAL_KINDS = [
    Family("clip", "CLIPModel", CLIP, picture_and_text, QV_PROJ, 8, GIVEN, output="logits_per_image"),
    Family("siglip", "SiglipModel", CLIP, picture_and_text, QV_PROJ, 8, GIVEN, output="logits_per_image"),
    Family(
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama"} | LLAMA,
            "vision_config": {"model_type": "clip_vision_model"} | CLIP["vision_config"],
            "image_token_index": 63,
            "vision_feature_layer": -1,
        },
        lambda: {
            "input_ids": torch.cat([torch.full((2, 4), 63), tokens()], 1),
            "labels": torch.cat([torch.full((2, 4), -100), tokens()], 1),
            "pixel_values": draw(2, 3, 8, 8),
        },
        QV_PROJ,
        8,
        GIVEN,
    ),
    Family(
        "qwen2-vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "temporal_patch_size": 1,
            },
            "image_token_id": 63,
            "video_token_id": 62,
            "vision_start_token_id": 61,
            "vision_end_token_id": 60,
        },
        lambda: {
            "input_ids": torch.tensor([[61, 63, 60, 5, 6, 7]]),
            "mm_token_type_ids": torch.tensor([[0, 1, 0, 0, 0, 0]]),
            "labels": torch.tensor([[-100, -100, -100, 5, 6, 7]]),
            "pixel_values": draw(4, 48),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        },
        QV_PROJ,
        4,
        GIVEN,
        left_out=r"model\.visual\.blocks\.0\.attn\.qkv",
    ),
    Family(
        "sam",
        "SamModel",
        {
            "vision_config": BODY
            | {
                "image_size": 16,
                "patch_size": 4,
                "output_channels": 16,
                "mlp_dim": 24,
                "num_pos_feats": 8,
                "window_size": 2,
                "global_attn_indexes": [0],
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 16, "patch_size": 4},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 24,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        lambda: {"pixel_values": draw(1, 3, 16, 16), "input_points": torch.tensor([[[[3.0, 4.0]]]])},
        QV_PROJ,
        14,
        GIVEN,
        left_out=r"vision_encoder\.layers\.0\.attn\.qkv",
        output="pred_masks",
    ),
]

TO_QV = {"to_q": R_Q, "to_v": R_V}


def denoised(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: draw(*shape) for name, shape in shapes.items()} | {"timestep": torch.tensor([3, 7])}


DIFFUSERS = [
    # A down, the middle and an up block: 4 transformers, each of which attends to itself and to the text.
    Family(
        "unet",
        "UNet2DConditionModel",
        {
            "sample_size": 4,
            "block_out_channels": (8,),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        },
        lambda: denoised(sample=(2, 4, 4, 4), encoder_hidden_states=(2, 3, 16)),
        TO_QV,
        16,
        list(TO_QV),
        output="sample",
    ),
    # Joint attention: the text stream has projections of its own, and the last block has no use for its queries.
    Family(
        "sd3",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        lambda: denoised(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 3, 16), pooled_projections=(2, 16)),
        TO_QV | {"add_q_proj": R_Q, "add_v_proj": R_V},
        8,
        list(TO_QV),
        idle="transformer_blocks.1.attn.add_q_proj",
        output="sample",
    ),
    Family(
        "flux",
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda: (
            denoised(hidden_states=(2, 4, 4), encoder_hidden_states=(2, 3, 16), pooled_projections=(2, 16))
            | {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
        ),
        TO_QV | {"add_q_proj": R_Q, "add_v_proj": R_V},
        6,
        list(TO_QV),
        output="sample",
    ),
    Family(
        "pixart",
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        lambda: (
            denoised(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 3, 16))
            | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        ),
        TO_QV,
        4,
        list(TO_QV),
        output="sample",
    ),
]

FAMILIES = [*DECODERS, *ENCODERS, *VISION_AND_SOUND, *SEQUENCE_TO_SEQUENCE, *SEVERAL_KINDS, *DIFFUSERS]
# Of the fast tests: some of each kind, and those whose last bits depend on the processor most.
FAST = {
    "llama",
    "gpt2",
    "mixtral",
    "mamba",
    "bert",
    "longformer",
    "segformer",
    "whisper",
    "t5",
    "siglip",
    "unet",
    "sd3",
}
each_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=() if family.name in FAST else pytest.mark.slow)
        for family in FAMILIES
    ],
)


def speclora(family: Family, **options: Any) -> SpecLoRAConfig:
    return SpecLoRAConfig(**{"r": 2, "lora_alpha": 4, "k": K, "target_modules": family.spec_targets} | options)


def fisherlora(family: Family, **options: Any) -> FisherLoRAConfig:
    targets = list(family.ranks) if family.refusal else None
    return FisherLoRAConfig(**{"r": R, "r_q": R_Q, "r_v": R_V, "target_modules": targets} | options)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def key_of(name: str, keys: Iterable[str]) -> str:
    """The one of `keys` that a module's name ends in."""
    (key,) = (key for key in keys if name.endswith(f".{key}"))
    return key


def frozen_copy(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters, by the names they have without an adapter."""
    return {
        name.replace("base_layer.", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


def train_two_steps(family: Family, model: nn.Module) -> None:
    """Two steps of AdamW, after which every trainable tensor has had a gradient beyond rounding and has changed."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    before = {name: p.detach().clone() for name, p in trainable.items()}
    largest = dict.fromkeys(trainable, 0.0)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss = family.loss(model)
        loss.backward()
        assert loss.isfinite()
        assert [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()] == []
        for name, p in trainable.items():
            largest[name] = max(largest[name], float(p.grad.abs().max()))
        optimizer.step()
    used = [name for name in trainable if not (family.idle and family.idle in name)]
    least = LEAST_GRADIENT * max(largest.values())
    assert [name for name in used if largest[name] < least or torch.equal(trainable[name], before[name])] == []


def check_life(family: Family, config: Any, tmp_path: Any, *, export: bool = True) -> dict[str, LoraLayer]:
    """The base's own outputs at first, two steps, save and load, merge, export; returns the layers that were adapted."""
    base = family.build()
    fresh = [copy.deepcopy(base) for _ in range(2)]
    weights = frozen_copy(base)
    untouched = family.outputs(base)
    assert untouched.isfinite().all()

    model = get_peft_model(base, config)
    layers = lora_layers(model.get_base_model())
    assert_close_outputs(family.outputs(model), untouched)
    train_two_steps(family, model)
    after = frozen_copy(model.get_base_model())
    assert after.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], after[name])] == []
    trained = family.outputs(model)
    assert (trained - untouched).abs().max() > 10 * TOLERANCE[torch.float32] * untouched.abs().max()

    model.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(fresh[0], tmp_path / "own")
    assert loaded.peft_config["default"].peft_type == config.peft_type
    assert_close_outputs(family.outputs(loaded), trained)
    if export:
        to_lora(model, tmp_path / "plain")
        plain = PeftModel.from_pretrained(fresh[1], tmp_path / "plain")
        assert plain.peft_config["default"].peft_type == "LORA"
        assert_close_outputs(family.outputs(plain), trained)
    merged = model.merge_and_unload(safe_merge=True)
    assert not lora_layers(merged)
    assert_close_outputs(family.outputs(merged), trained)
    return layers


@pytest.mark.slow
@each_family
def test_speclora(family, tmp_path):
    default = PEFT_DEFAULTS.get(getattr(family.build().config, "model_type", None))
    assert (default is None) == (family.spec_targets is not None), (
        "targets are given where PEFT has none, and only there"
    )
    targets = default or family.spec_targets
    layers = check_life(family, speclora(family), tmp_path)
    assert {key_of(name, targets) for name in layers} == set(targets)
    assert all(layer.lora_spec["default"].weight.shape == (K,) for layer in layers.values())


@pytest.mark.slow
@each_family
def test_fisherlora(family, tmp_path):
    base = family.build()
    if family.refusal:
        with pytest.raises(ValueError, match=rf"^FisherLoRA .*{family.refusal}"):
            get_peft_model(base, FisherLoRAConfig())
        assert not lora_layers(base)
    elif family.left_out:
        with pytest.warns(UserWarning, match=rf"^FisherLoRA: .* adapted, but '{family.left_out}' and"):
            get_peft_model(base, FisherLoRAConfig())
    layers = check_life(family, fisherlora(family), tmp_path)
    assert {key_of(name, family.ranks) for name in layers} == family.ranks.keys()
    assert len(layers) == family.count
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.shape[0] == family.ranks[key_of(name, family.ranks)], name
        assert layer.scaling["default"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("config", [speclora, fisherlora], ids=["speclora", "fisherlora"])
def test_an_auto_class_finds_base_and_adapter(config, tmp_path):
    family = next(family for family in FAMILIES if family.name == "qwen3")
    family.build().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(family, task_type="CAUSAL_LM"))
    train_two_steps(family, model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close_outputs(family.outputs(loaded), family.outputs(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_fisherlora_on_the_weights_of_experts(name, tmp_path):
    family = next(family for family in FAMILIES if family.name == name)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    layers = check_life(family, fisherlora(family, target_parameters=experts), tmp_path, export=False)
    adapted = {name: layer for name, layer in layers.items() if isinstance(layer, ParamWrapper)}
    assert sorted(layer.parameter_name for layer in adapted.values()) == ["down_proj"] * 2 + ["gate_up_proj"] * 2
    assert {layer.r["default"] for layer in adapted.values()} == {R}
    assert {layer.r["default"] for name, layer in layers.items() if name.endswith("q_proj")} == {R_Q}
    assert {layer.r["default"] for name, layer in layers.items() if name.endswith("v_proj")} == {R_V}


@pytest.mark.parametrize("config", [SpecLoRAConfig, FisherLoRAConfig])
@pytest.mark.parametrize("targets", [["in_proj", "out_proj"], "all-linear"])
def test_mamba_s_output_projection_is_refused_as_in_lora(config, targets):
    """Its fused kernels read that weight and would pass the adapter by."""
    family = next(family for family in FAMILIES if family.name == "mamba")
    base = family.build()
    with pytest.raises(ValueError, match=r"out_proj.* is incompatible with Mamba"):
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=targets))
    method = config.__name__.removesuffix("Config")
    with pytest.raises(ValueError, match=rf"^{method} does not support 'backbone\.layers\.0\.mixer\.out_proj'"):
        get_peft_model(base, config(target_modules=targets))
    assert not lora_layers(base)


# PixArt has no `add_adapter` in diffusers.
NATIVE = [family for family in DIFFUSERS if family.name != "pixart"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [speclora, fisherlora], ids=["speclora", "fisherlora"])
@pytest.mark.parametrize("family", NATIVE, ids=[family.name for family in NATIVE])
def test_diffusers_adds_it_natively(family, config):
    base = family.build()
    fresh, untouched = copy.deepcopy(base), family.outputs(base)
    base.add_adapter(config(family), adapter_name="mine")
    assert_close_outputs(family.outputs(base), untouched)
    train_two_steps(family, base)
    trained = family.outputs(base)
    tensors = get_peft_model_state_dict(base, adapter_name="mine")
    fresh.add_adapter(config(family), adapter_name="mine")
    loaded = set_peft_model_state_dict(fresh, tensors, adapter_name="mine")
    assert not loaded.unexpected_keys
    assert_close_outputs(family.outputs(fresh), trained)
    base.disable_adapters()
    assert_close_outputs(family.outputs(base), untouched)
