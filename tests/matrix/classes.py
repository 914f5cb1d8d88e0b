"""The classes of the matrix: every kind of model that users merge."""

from __future__ import annotations

from collections.abc import Sequence

from tests.matrix.row import Row, row

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES = {**_LAYERS, "intermediate_size": 48}
_BERT = {**_SIZES, "vocab_size": 96, "max_position_embeddings": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0}
_VIT = {**_SIZES, "image_size": 16, "patch_size": 8}
_SIGLIP = {**_VIT, "model_type": "siglip_vision_model"}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_GPT2 = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "pad_token_id": 0,
    **{
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    },
}
_MAMBA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_SOUND = {
    **_SIZES,
    "vocab_size": 32,
    "conv_dim": (16, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_LABELS = {"num_labels": 3}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

_QV, _GATED = ("q_proj", "v_proj"), ("q_proj", "o_proj", "down_proj")
_QUERIES, _FUSED = ("query", "value"), ("query_key_value", "dense")
_MLP = ("q_proj", "fc1")
_CLASSIFIER = ("classifier",)

_DECODER, _ENCODER, _SEQ2SEQ = "decoder", "encoder", "encoder-decoder"
_MOE, _SSM, _EMBEDDING = "mixture of experts", "state space", "embedding"
_VISION, _AUDIO, _VLM = "vision", "audio", "vision-language"

ROWS: Sequence[Row] = (
    row("LlamaForCausalLM", _DECODER, _GATED, _LLAMA),
    row("LlamaForCausalLM, biases", _DECODER, _GATED, _LLAMA, attention_bias=True, mlp_bias=True),
    row("LlamaForCausalLM, tied", _DECODER, _GATED, _LLAMA, tie_word_embeddings=True),
    row("LlamaForSequenceClassification", _DECODER, _GATED, _LLAMA, _LABELS, heads=("score",)),
    row("LlamaModel", _DECODER, _GATED, _LLAMA),
    row("MistralForCausalLM", _DECODER, _GATED, _LLAMA, head_dim=16),
    row("Qwen2ForCausalLM", _DECODER, _GATED, _LLAMA, tie_word_embeddings=True),
    row("Qwen3ForCausalLM", _DECODER, _GATED, _LLAMA, head_dim=16),
    row("Gemma2ForCausalLM", _DECODER, _GATED, _LLAMA, head_dim=16),
    row("Gemma3ForCausalLM", _DECODER, _GATED, _LLAMA, head_dim=16),
    row("Phi3ForCausalLM", _DECODER, ("qkv_proj", "down_proj"), _LLAMA),
    row("GPT2LMHeadModel", _DECODER, ("c_attn", "c_proj"), _GPT2),
    row(
        "GPT2LMHeadModel, untied", _DECODER, ("c_proj", "lm_head"), _GPT2, tie_word_embeddings=False
    ),
    row("GPTNeoXForCausalLM", _DECODER, ("query_key_value", "dense_4h_to_h"), _BERT),
    row("OPTForCausalLM", _DECODER, _MLP, _BERT, ffn_dim=48, word_embed_proj_dim=32),
    row("FalconForCausalLM", _DECODER, _FUSED, _BERT),
    row("StableLmForCausalLM", _DECODER, _GATED, _LLAMA, use_qkv_bias=True),
    row("CohereForCausalLM", _DECODER, _GATED, _LLAMA),
    row("Olmo2ForCausalLM", _DECODER, _GATED, _LLAMA),
    row("BloomForCausalLM", _DECODER, _FUSED, vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    row("MixtralForCausalLM", _MOE, _QV, _LLAMA, num_local_experts=4),
    row(
        "Qwen3MoeForCausalLM",
        _MOE,
        _QV,
        _LLAMA,
        stacks=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        head_dim=16,
    ),
    row("OlmoeForCausalLM", _MOE, _QV, _LLAMA, num_experts=4),
    row("GptOssForCausalLM", _MOE, _QV, _LLAMA, num_local_experts=4, head_dim=16),
    row(
        "DeepseekV3ForCausalLM",
        _MOE,
        ("q_b_proj", "o_proj"),
        _LLAMA,
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
    row("MambaForCausalLM", _SSM, ("in_proj", "x_proj"), _MAMBA),
    row("Mamba2ForCausalLM", _SSM, ("in_proj",), _MAMBA, num_heads=8, head_dim=8, n_groups=2),
    row(
        "JambaForCausalLM",
        _SSM,
        ("q_proj", "in_proj"),
        _LLAMA,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    row("BertForMaskedLM", _ENCODER, _QUERIES, _BERT),
    row("BertForSequenceClassification", _ENCODER, _QUERIES, _BERT, _LABELS, heads=_CLASSIFIER),
    row("BertForTokenClassification", _ENCODER, _QUERIES, _BERT, _LABELS, heads=_CLASSIFIER),
    row("RobertaForMaskedLM", _ENCODER, ("query", "dense"), _BERT),
    row("RobertaForSequenceClassification", _ENCODER, _QUERIES, _BERT, _LABELS, heads=_CLASSIFIER),
    row(
        "DistilBertForSequenceClassification",
        _ENCODER,
        ("q_lin", "lin1"),
        _LABELS,
        heads=("classifier", "pre_classifier"),
        vocab_size=96,
        max_position_embeddings=64,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
    ),
    row("ElectraForPreTraining", _ENCODER, _QUERIES, _BERT, embedding_size=16),
    row(
        "DebertaV2ForSequenceClassification",
        _ENCODER,
        ("query_proj", "value_proj"),
        _BERT,
        _LABELS,
        heads=_CLASSIFIER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    row("ModernBertForMaskedLM", _ENCODER, ("Wqkv", "Wi"), _BERT, pad_token_id=0),
    row("BertModel", _EMBEDDING, _QUERIES, _BERT),
    row("RobertaModel", _EMBEDDING, ("query", "dense"), _BERT),
    row("XLMRobertaModel", _EMBEDDING, _QUERIES, _BERT),
    row("MPNetModel", _EMBEDDING, ("q", "v"), _BERT),
    row("ModernBertModel", _EMBEDDING, ("Wqkv", "Wi"), _BERT, pad_token_id=0),
    row("T5EncoderModel", _EMBEDDING, ("q", "wi"), _T5),
    row("T5ForConditionalGeneration, v1.0", _SEQ2SEQ, ("q", "wi"), _T5),
    row(
        "T5ForConditionalGeneration, v1.1",
        _SEQ2SEQ,
        ("q", "wi_0"),
        _T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    row("BartForConditionalGeneration", _SEQ2SEQ, _MLP, _BART, max_position_embeddings=64),
    row("MarianMTModel", _SEQ2SEQ, _MLP, _BART, max_position_embeddings=64),
    row(
        "WhisperForConditionalGeneration",
        _AUDIO,
        _MLP,
        _BART,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    row("Wav2Vec2ForCTC", _AUDIO, ("q_proj", "output_dense"), _SOUND),
    row(
        "HubertForSequenceClassification",
        _AUDIO,
        ("q_proj", "output_dense"),
        _SOUND,
        _LABELS,
        heads=("classifier", "projector"),
    ),
    row("ViTForImageClassification", _VISION, _MLP, _VIT, _LABELS, heads=_CLASSIFIER),
    row("ViTModel", _VISION, _MLP, _VIT),
    row("DeiTForImageClassification", _VISION, _MLP, _VIT, _LABELS, heads=_CLASSIFIER),
    row(
        "SwinForImageClassification",
        _VISION,
        ("q_proj", "reduction"),
        _LABELS,
        heads=_CLASSIFIER,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    row(
        "BeitForImageClassification",
        _VISION,
        _MLP,
        _VIT,
        _LABELS,
        heads=_CLASSIFIER,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
    ),
    row("Dinov2Model", _VISION, _MLP, _VIT, mlp_ratio=2),
    row(
        "ConvNextForImageClassification",
        _VISION,
        ("pwconv1", "pwconv2"),
        _LABELS,
        heads=_CLASSIFIER,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_stages=2,
    ),
    row(
        "ResNetForImageClassification",
        _VISION,
        ("convolution",),
        _LABELS,
        heads=_CLASSIFIER,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
    ),
    row("CLIPModel", _VLM, _MLP, text_config=_BERT, vision_config=_VIT, projection_dim=24),
    row("SiglipModel", _VLM, _MLP, text_config=_BERT, vision_config=_VIT),
    row(
        "LlavaForConditionalGeneration",
        _VLM,
        _QV,
        vision_config={**_VIT, "model_type": "clip_vision_model", "projection_dim": 32},
        text_config={**_LLAMA, "model_type": "llama"},
        image_token_index=95,
    ),
    row(
        "Qwen2VLForConditionalGeneration",
        _VLM,
        ("q_proj", "qkv"),
        text_config={**_LLAMA, "rope_parameters": _ROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        image_token_id=95,
        video_token_id=94,
        vision_start_token_id=93,
        vision_end_token_id=92,
    ),
    row(
        "Gemma3ForConditionalGeneration",
        _VLM,
        _QV,
        text_config={**_LLAMA, "head_dim": 16},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
    ),
    row(
        "PaliGemmaForConditionalGeneration",
        _VLM,
        _QV,
        text_config={**_LLAMA, "model_type": "gemma", "head_dim": 8},
        vision_config={**_SIGLIP, "projection_dim": 32},
        projection_dim=32,
        image_token_index=95,
    ),
    row(
        "Idefics3ForConditionalGeneration",
        _VLM,
        _QV,
        text_config={**_LLAMA, "model_type": "llama"},
        vision_config=_VIT,
        image_token_id=95,
        scale_factor=2,
    ),
)
