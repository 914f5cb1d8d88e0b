"""Classes of transformers, each made small: the rows of the matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers as hf
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Row:
    """One class: a name for the table, how it is made, what a LoRA and FlexMerge see in it.

    Attributes:
        lora: the last names of the modules that an adapter changes, as for PEFT's `target_modules`.
        heads: the first names of tensors that docs/blocks.md calls heads of one task.
    """

    name: str
    kind: str
    make: Callable[[], PreTrainedModel]
    lora: tuple[str, ...]
    heads: tuple[str, ...] = ()


_TEXT = {"vocab_size": 96, "max_position_embeddings": 64}
_LLAMA = {
    **_TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_BERT = {
    **_TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_BART = {
    **_TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_SOUND = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_LABELS = {"num_labels": 3}
_QV = ("q_proj", "v_proj")
_GATED = ("q_proj", "o_proj", "down_proj")


def _made(name: str, *parts: Mapping[str, Any], config: str = "", **more: Any) -> Any:
    """A function that makes the class `name` from its configuration, or from that of `config`."""
    model, settings = getattr(hf, name), {k: v for part in parts for k, v in part.items()} | more
    kind = getattr(hf, config) if config else model.config_class
    return lambda: model(kind(**settings))


def _text(name: str, lora: Sequence[str] = _GATED, /, **more: Any) -> tuple[Any, tuple[str, ...]]:
    return _made(name, _LLAMA, **more), tuple(lora)


def _nested(name: str, **parts: Any) -> Callable[[], PreTrainedModel]:
    model = getattr(hf, name)
    return lambda: model(model.config_class(**parts))


DECODER, ENCODER, SEQ2SEQ = "decoder", "encoder", "encoder-decoder"
VISION, AUDIO, VLM = "vision", "audio", "vision-language"
MOE, SSM = "mixture of experts", "state space"

ROWS: tuple[Row, ...] = (
    Row("LlamaForCausalLM", DECODER, *_text("LlamaForCausalLM")),
    Row(
        "LlamaForCausalLM, biases",
        DECODER,
        *_text("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    ),
    Row(
        "LlamaForCausalLM, tied",
        DECODER,
        *_text("LlamaForCausalLM", tie_word_embeddings=True),
    ),
    Row(
        "LlamaForSequenceClassification",
        DECODER,
        *_text("LlamaForSequenceClassification", **_LABELS),
        ("score",),
    ),
    Row("LlamaModel", DECODER, *_text("LlamaModel")),
    Row("MistralForCausalLM", DECODER, *_text("MistralForCausalLM", head_dim=16)),
    Row("Qwen2ForCausalLM", DECODER, *_text("Qwen2ForCausalLM", tie_word_embeddings=True)),
    Row("Qwen3ForCausalLM", DECODER, *_text("Qwen3ForCausalLM", head_dim=16)),
    Row("Gemma2ForCausalLM", DECODER, *_text("Gemma2ForCausalLM", head_dim=16)),
    Row("Gemma3ForCausalLM", DECODER, *_text("Gemma3ForCausalLM", head_dim=16)),
    Row("Phi3ForCausalLM", DECODER, *_text("Phi3ForCausalLM", ("qkv_proj", "down_proj"))),
    Row(
        "GPT2LMHeadModel",
        DECODER,
        _made("GPT2LMHeadModel", vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4),
        ("c_attn", "c_proj"),
    ),
    Row(
        "GPTNeoXForCausalLM",
        DECODER,
        _made("GPTNeoXForCausalLM", _BERT),
        ("query_key_value", "dense_4h_to_h"),
    ),
    Row(
        "OPTForCausalLM",
        DECODER,
        _made("OPTForCausalLM", _BERT, ffn_dim=48, word_embed_proj_dim=32),
        ("q_proj", "fc1"),
    ),
    Row(
        "FalconForCausalLM",
        DECODER,
        _made("FalconForCausalLM", _BERT),
        ("query_key_value", "dense"),
    ),
    Row("StableLmForCausalLM", DECODER, *_text("StableLmForCausalLM", use_qkv_bias=True)),
    Row("CohereForCausalLM", DECODER, *_text("CohereForCausalLM")),
    Row("Olmo2ForCausalLM", DECODER, *_text("Olmo2ForCausalLM")),
    Row(
        "BloomForCausalLM",
        DECODER,
        _made("BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        ("query_key_value", "dense"),
    ),
    Row("MixtralForCausalLM", MOE, *_text("MixtralForCausalLM", _QV, num_local_experts=4)),
    Row(
        "Qwen3MoeForCausalLM",
        MOE,
        *_text(
            "Qwen3MoeForCausalLM",
            _QV,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            head_dim=16,
        ),
    ),
    Row("OlmoeForCausalLM", MOE, *_text("OlmoeForCausalLM", _QV, num_experts=4)),
    Row(
        "DeepseekV3ForCausalLM",
        MOE,
        *_text(
            "DeepseekV3ForCausalLM",
            ("q_b_proj", "o_proj"),
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            moe_intermediate_size=24,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            num_key_value_heads=4,
        ),
    ),
    Row(
        "MambaForCausalLM",
        SSM,
        _made(
            "MambaForCausalLM", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8
        ),
        ("in_proj", "x_proj"),
    ),
    Row(
        "Mamba2ForCausalLM",
        SSM,
        _made(
            "Mamba2ForCausalLM",
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=2,
        ),
        ("in_proj",),
    ),
    Row(
        "JambaForCausalLM",
        SSM,
        *_text(
            "JambaForCausalLM",
            ("q_proj", "in_proj"),
            num_experts=4,
            mamba_d_state=8,
            mamba_dt_rank=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
        ),
    ),
    Row("BertForMaskedLM", ENCODER, _made("BertForMaskedLM", _BERT), ("query", "value")),
    Row("BertModel", ENCODER, _made("BertModel", _BERT), ("query", "value")),
    Row(
        "BertForSequenceClassification",
        ENCODER,
        _made("BertForSequenceClassification", _BERT, _LABELS),
        ("query", "value"),
        ("classifier",),
    ),
    Row(
        "BertForTokenClassification",
        ENCODER,
        _made("BertForTokenClassification", _BERT, _LABELS),
        ("query", "value"),
        ("classifier",),
    ),
    Row("RobertaForMaskedLM", ENCODER, _made("RobertaForMaskedLM", _BERT), ("query", "dense")),
    Row("RobertaModel", ENCODER, _made("RobertaModel", _BERT), ("query", "dense")),
    Row(
        "RobertaForSequenceClassification",
        ENCODER,
        _made("RobertaForSequenceClassification", _BERT, _LABELS),
        ("query", "value"),
        ("classifier",),
    ),
    Row(
        "DistilBertForSequenceClassification",
        ENCODER,
        _made(
            "DistilBertForSequenceClassification",
            _TEXT,
            _LABELS,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
        ),
        ("q_lin", "lin1"),
        ("classifier", "pre_classifier"),
    ),
    Row(
        "ElectraForPreTraining",
        ENCODER,
        _made("ElectraForPreTraining", _BERT, embedding_size=16),
        ("query", "value"),
    ),
    Row(
        "DebertaV2ForSequenceClassification",
        ENCODER,
        _made(
            "DebertaV2ForSequenceClassification",
            _BERT,
            _LABELS,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        ("query_proj", "value_proj"),
        ("classifier",),
    ),
    Row(
        "ModernBertForMaskedLM",
        ENCODER,
        _made("ModernBertForMaskedLM", _BERT, pad_token_id=0),
        ("Wqkv", "Wi"),
    ),
    Row("XLMRobertaModel", ENCODER, _made("XLMRobertaModel", _BERT), ("query", "value")),
    Row("MPNetModel", ENCODER, _made("MPNetModel", _BERT), ("q", "v")),
    Row(
        "T5ForConditionalGeneration, v1.0",
        SEQ2SEQ,
        _made("T5ForConditionalGeneration", _T5),
        ("q", "wi"),
    ),
    Row(
        "T5ForConditionalGeneration, v1.1",
        SEQ2SEQ,
        _made(
            "T5ForConditionalGeneration",
            _T5,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        ("q", "wi_0"),
    ),
    Row("T5EncoderModel", ENCODER, _made("T5EncoderModel", _T5), ("q", "wi")),
    Row(
        "BartForConditionalGeneration",
        SEQ2SEQ,
        _made("BartForConditionalGeneration", _BART),
        ("q_proj", "fc1"),
    ),
    Row("MarianMTModel", SEQ2SEQ, _made("MarianMTModel", _BART, pad_token_id=0), ("q_proj", "fc1")),
    Row(
        "WhisperForConditionalGeneration",
        AUDIO,
        _made(
            "WhisperForConditionalGeneration",
            _BART,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        ("q_proj", "fc1"),
    ),
    Row("Wav2Vec2ForCTC", AUDIO, _made("Wav2Vec2ForCTC", _SOUND), ("q_proj", "output_dense")),
    Row(
        "HubertForSequenceClassification",
        AUDIO,
        _made("HubertForSequenceClassification", _SOUND, _LABELS),
        ("q_proj", "output_dense"),
        ("classifier", "projector"),
    ),
    Row(
        "ViTForImageClassification",
        VISION,
        _made("ViTForImageClassification", _VIT, _LABELS),
        ("q_proj", "fc1"),
        ("classifier",),
    ),
    Row("ViTModel", VISION, _made("ViTModel", _VIT), ("q_proj", "query")),
    Row(
        "DeiTForImageClassification",
        VISION,
        _made("DeiTForImageClassification", _VIT, _LABELS),
        ("q_proj", "fc2"),
        ("classifier",),
    ),
    Row(
        "SwinForImageClassification",
        VISION,
        _made(
            "SwinForImageClassification",
            _LABELS,
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        ("q_proj", "reduction"),
        ("classifier",),
    ),
    Row(
        "ConvNextForImageClassification",
        VISION,
        _made(
            "ConvNextForImageClassification",
            _LABELS,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
        ),
        ("pwconv1", "pwconv2"),
        ("classifier",),
    ),
    Row(
        "BeitForImageClassification",
        VISION,
        _made(
            "BeitForImageClassification",
            _VIT,
            _LABELS,
            use_relative_position_bias=True,
            layer_scale_init_value=0.1,
        ),
        ("q_proj", "fc1"),
        ("classifier",),
    ),
    Row("Dinov2Model", VISION, _made("Dinov2Model", _VIT, mlp_ratio=2), ("q_proj", "fc1")),
    Row(
        "ResNetForImageClassification",
        VISION,
        _made(
            "ResNetForImageClassification",
            _LABELS,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
        ),
        ("convolution",),
        ("classifier",),
    ),
    Row(
        "CLIPModel",
        VLM,
        _nested(
            "CLIPModel", text_config=_BERT, vision_config=_VIT, projection_dim=24
        ),
        ("q_proj", "fc1"),
    ),
    Row(
        "SiglipModel",
        VLM,
        _nested("SiglipModel", text_config=_BERT, vision_config=_VIT),
        ("q_proj", "fc1"),
    ),
    Row(
        "LlavaForConditionalGeneration",
        VLM,
        _nested(
            "LlavaForConditionalGeneration",
            vision_config={**_VIT, "model_type": "clip_vision_model", "projection_dim": 32},
            text_config={**_LLAMA, "model_type": "llama"},
            image_token_index=95,
        ),
        _QV,
    ),
    Row(
        "Qwen2VLForConditionalGeneration",
        VLM,
        _nested(
            "Qwen2VLForConditionalGeneration",
            text_config={
                **_LLAMA,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
            image_token_id=95,
            video_token_id=94,
            vision_start_token_id=93,
            vision_end_token_id=92,
        ),
        ("q_proj", "qkv"),
    ),
    Row(
        "Gemma3ForConditionalGeneration",
        VLM,
        _nested(
            "Gemma3ForConditionalGeneration",
            text_config={**_LLAMA, "head_dim": 16},
            vision_config={**_VIT, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
        ),
        _QV,
    ),
    Row(
        "PaliGemmaForConditionalGeneration",
        VLM,
        _nested(
            "PaliGemmaForConditionalGeneration",
            text_config={**_LLAMA, "model_type": "gemma", "head_dim": 8},
            vision_config={**_VIT, "model_type": "siglip_vision_model", "projection_dim": 32},
            projection_dim=32,
            image_token_index=95,
        ),
        _QV,
    ),
    Row(
        "Idefics3ForConditionalGeneration",
        VLM,
        _nested(
            "Idefics3ForConditionalGeneration",
            text_config={**_LLAMA, "model_type": "llama"},
            vision_config=_VIT,
            image_token_id=95,
            scale_factor=2,
        ),
        _QV,
    ),
)
