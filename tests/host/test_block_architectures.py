"""Blocks of real models, tiny and untrained: names of the classes and names in saved files."""

from __future__ import annotations

from functools import cache

import pytest
import transformers
from safetensors import safe_open

from mergekit_ext.host.blocks import (
    blocks_of,
    is_task_head,
    kind_of,
    layer_of,
    tied_groups,
)

TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS["intermediate_size"] = 16
BERT = {**TOKENS, **WIDTHS}
LLAMA = {**BERT, "num_key_value_heads": 1, "tie_word_embeddings": False}
EXPERTS = {**LLAMA, "num_experts_per_tok": 1, "num_experts": 2, "num_local_experts": 2}
EXPERTS |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8)
IMAGE = {**WIDTHS, "image_size": 4, "patch_size": 2}
GPT2 = {**TOKENS, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
BART = {**TOKENS, "d_model": 8, "decoder_start_token_id": 1}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
WHISPER = {**BART, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8}
T5 = {**TOKENS, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
DISTILBERT = {"vocab_size": 32, "dim": 8, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
CLIP = {"text_config": BERT, "vision_config": IMAGE, "projection_dim": 8}

LLAMA_LAYER = "input_layernorm attention post_attention_layernorm mlp"
GEMMA_LAYER = (
    "attention {}post_attention_layernorm pre_feedforward_layernorm mlp post_feedforward_layernorm"
)
QK_NORMS = "self_attn.k_norm self_attn.q_norm "
BERT_LAYER = "attention attention.output.LayerNorm mlp output.LayerNorm"
GPT2_LAYER = "ln_1 attention ln_2 mlp"
VIT_LAYER = "layernorm_before attention layernorm_after mlp"
CLIP_LAYER = "layer_norm1 attention layer_norm2 mlp"
BART_ENCODER = "self_attn_layer_norm attention final_layer_norm mlp"
BART_DECODER = (
    "self_attn_layer_norm attention encoder_attn_layer_norm cross_attention final_layer_norm mlp"
)
T5_ENCODER = "layer.0.layer_norm attention layer.1.layer_norm mlp"
T5_DECODER = (
    "layer.0.layer_norm attention layer.1.layer_norm cross_attention layer.2.layer_norm mlp"
)


def llama(layer: str) -> str:
    return f"model.embed_tokens | model.layers: {layer} | model.norm lm_head"


def bert(root: str, head: str, embeddings: str = "position token_type word") -> str:
    before = " ".join(f"{root}.embeddings.{kind}_embeddings" for kind in embeddings.split())
    return f"{before} {root}.embeddings.LayerNorm | {root}.encoder.layer: {BERT_LAYER} | {head}"


def gpt2(head: str) -> str:
    return f"transformer.wpe transformer.wte | transformer.h: {GPT2_LAYER} | transformer.ln_f{head}"


def vit(root: str, stack: str) -> str:
    embeddings = f"{root}.embeddings {root}.embeddings.patch_embeddings.projection"
    return f"{embeddings} | {root}.{stack}: {VIT_LAYER} | {root}.layernorm classifier*"


def clip(prefix: str, between: str = "") -> str:
    return (
        f"{prefix}embeddings {prefix}embeddings.patch_embedding "
        f"{prefix}embeddings.position_embedding {prefix}pre_layrnorm | "
        f"{prefix}encoder.layers: {CLIP_LAYER} | {prefix}post_layernorm{between}"
    )


def bart(head: str) -> str:
    return (
        "model.shared model.encoder.embed_positions model.encoder.layernorm_embedding | "
        f"model.encoder.layers: {BART_ENCODER} | "
        "model.decoder.embed_positions model.decoder.layernorm_embedding | "
        f"model.decoder.layers: {BART_DECODER} | {head}"
    )


def t5(prefix: str, decoder: str, head: str = "") -> str:
    return (
        f"{prefix}shared | {prefix}encoder.block: {T5_ENCODER} | {prefix}encoder.final_layer_norm"
        + decoder.format(prefix=prefix)
        + head
    )


T5_BOTH = f" | {{prefix}}decoder.block: {T5_DECODER} | {{prefix}}decoder.final_layer_norm"

# Every block outside of the layers and every block of one layer, in network order. A part with a
# colon is a stack and the blocks of each of its layers; a star marks the heads of one task. Names
# that are tied are in the block of the first. A third string: the blocks in the saved file, where
# files keep older names.
MODELS = {
    "LlamaForCausalLM": (LLAMA, llama(LLAMA_LAYER)),
    "MistralForCausalLM": (LLAMA, llama(LLAMA_LAYER)),
    "MixtralForCausalLM": (EXPERTS, llama(LLAMA_LAYER)),
    "Qwen2ForCausalLM": (LLAMA, llama(LLAMA_LAYER)),
    "Qwen2ForSequenceClassification": (LLAMA, llama(LLAMA_LAYER).replace("lm_head", "score*")),
    "Qwen3ForCausalLM": (
        {**LLAMA, "head_dim": 4},
        llama(f"input_layernorm attention {QK_NORMS}post_attention_layernorm mlp"),
    ),
    "Qwen2MoeForCausalLM": (EXPERTS, llama(LLAMA_LAYER)),
    "GemmaForCausalLM": ({**LLAMA, "head_dim": 4}, llama(LLAMA_LAYER)),
    "Gemma2ForCausalLM": (
        {**LLAMA, "head_dim": 4},
        llama("input_layernorm " + GEMMA_LAYER.format("")),
    ),
    "Gemma3ForCausalLM": (
        {**LLAMA, "head_dim": 4},
        llama("input_layernorm " + GEMMA_LAYER.format(QK_NORMS)),
    ),
    "PhiForCausalLM": (
        {**LLAMA, "qk_layernorm": True},
        llama("input_layernorm attention self_attn.k_layernorm self_attn.q_layernorm mlp").replace(
            "model.norm", "model.final_layernorm"
        ),
    ),
    "Phi3ForCausalLM": (LLAMA, llama(LLAMA_LAYER)),
    "BertForSequenceClassification": (BERT, bert("bert", "bert.pooler.dense classifier*")),
    "BertForTokenClassification": (BERT, bert("bert", "classifier*")),
    "BertForQuestionAnswering": (BERT, bert("bert", "qa_outputs*")),
    "BertForMaskedLM": (
        BERT,
        bert(
            "bert",
            "cls.predictions.transform.dense cls.predictions.transform.LayerNorm cls.predictions",
        ),
    ),
    "BertLMHeadModel": (
        {**BERT, "is_decoder": True, "add_cross_attention": True},
        bert(
            "bert",
            "cls.predictions.transform.dense cls.predictions.transform.LayerNorm cls.predictions",
        ).replace(
            "attention.output.LayerNorm",
            "attention.output.LayerNorm cross_attention crossattention.output.LayerNorm",
        ),
    ),
    "RobertaForSequenceClassification": (
        BERT,
        bert("roberta", "classifier.dense* classifier.out_proj*"),
    ),
    "RobertaForMaskedLM": (BERT, bert("roberta", "lm_head.dense lm_head.layer_norm lm_head")),
    "DistilBertForSequenceClassification": (
        DISTILBERT,
        bert("distilbert", "pre_classifier* classifier*", "position word")
        .replace("encoder.layer", "transformer.layer")
        .replace(BERT_LAYER, "attention sa_layer_norm mlp output_layer_norm"),
    ),
    "DebertaV2ForSequenceClassification": (
        {
            **BERT,
            "relative_attention": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
        },
        bert("deberta", "pooler.dense classifier*", "position word").replace(
            "| deberta.encoder.layer:",
            "deberta.encoder.rel_embeddings deberta.encoder.LayerNorm | deberta.encoder.layer:",
        ),
    ),
    "GPT2LMHeadModel": (GPT2, gpt2("")),
    "GPT2ForSequenceClassification": (GPT2, gpt2(" score*")),
    "T5ForConditionalGeneration": (T5, t5("", T5_BOTH)),
    "MT5ForConditionalGeneration": (
        {**T5, "feed_forward_proj": "gated-gelu"},
        t5("", T5_BOTH),
    ),
    "T5ForSequenceClassification": (
        T5,
        t5("transformer.", T5_BOTH, " classification_head.dense* classification_head.out_proj*"),
    ),
    "T5ForTokenClassification": (T5, t5("transformer.", "", " classifier*")),
    "BartForConditionalGeneration": (BART, bart("final_logits_bias")),
    "BartForSequenceClassification": (
        BART,
        bart("classification_head.dense* classification_head.out_proj*"),
    ),
    "ViTForImageClassification": (IMAGE, vit("vit", "layers"), vit("vit", "encoder.layer")),
    "CLIPVisionModel": (IMAGE, clip("")),
    "CLIPForImageClassification": (CLIP, clip("vision_model.", " classifier*")),
    "CLIPModel": (
        CLIP,
        clip("vision_model.", " visual_projection ")
        + "text_model.embeddings.position_embedding text_model.embeddings.token_embedding | "
        + f"text_model.encoder.layers: {CLIP_LAYER} | "
        + "text_model.final_layer_norm logit_scale text_projection",
    ),
    "WhisperForConditionalGeneration": (
        WHISPER,
        "model.encoder.conv1 model.encoder.conv2 model.encoder.embed_positions | "
        f"model.encoder.layers: {BART_ENCODER} | model.encoder.layer_norm "
        "model.decoder.embed_positions model.decoder.embed_tokens | "
        f"model.decoder.layers: {BART_DECODER} | model.decoder.layer_norm",
    ),
    "WhisperForAudioClassification": (
        {**WHISPER, "use_weighted_layer_sum": True, "classifier_proj_size": 4},
        f"encoder.conv1 encoder.conv2 encoder.embed_positions | encoder.layers: {BART_ENCODER} | "
        "encoder.layer_norm layer_weights* projector* classifier*",
    ),
    "GPTNeoXForCausalLM": (
        {**BERT, "tie_word_embeddings": False},
        f"gpt_neox.embed_in | gpt_neox.layers: {LLAMA_LAYER} | gpt_neox.final_layer_norm lm_head",
        f"gpt_neox.embed_in | gpt_neox.layers: {LLAMA_LAYER} | gpt_neox.final_layer_norm embed_out",
    ),
    "FalconForCausalLM": (
        {**BERT, "new_decoder_architecture": True, "num_kv_heads": 1},
        "transformer.word_embeddings | transformer.h: ln_attn attention ln_mlp mlp | "
        "transformer.ln_f",
    ),
    "MptForCausalLM": (
        {"d_model": 8, "n_heads": 2, "n_layers": 2, "vocab_size": 32},
        "transformer.wte | transformer.blocks: norm_1 attention norm_2 mlp | transformer.norm_f",
    ),
}


@cache
def model(architecture):
    cls = getattr(transformers, architecture)
    return cls(cls.config_class(**MODELS[architecture][0]))


def class_names(architecture, folder):
    return list(model(architecture).state_dict())


def file_names(architecture, folder):
    model(architecture).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return list(stored.keys())


def expected_blocks(text, layers=2):
    for part in text.split("|"):
        stack, colon, blocks = part.partition(":")
        if not colon:
            yield from part.replace("*", "").split()
        for depth in range(layers if colon else 0):
            yield from (f"{stack.strip()}.{depth}.{block}" for block in blocks.split())


def tied(architecture):
    return getattr(model(architecture).config, "tie_word_embeddings", False)


@pytest.mark.parametrize("source", [class_names, file_names])
@pytest.mark.parametrize("architecture", MODELS)
def test_blocks(architecture, source, tmp_path):
    names = source(architecture, tmp_path)
    text = MODELS[architecture][-1 if source is file_names else 1]
    blocks = blocks_of(reversed(names), "component", tied(architecture))
    assert list(blocks) == list(expected_blocks(text))
    assert sorted(name for members in blocks.values() for name in members) == sorted(names)
    heads = {name for name in text.split() if name.endswith("*")}
    assert {f"{b}*" for b, ms in blocks.items() if any(map(is_task_head, ms))} == heads
    assert [name for name in names if layer_of(name) and kind_of(name) == "other"] == []
    stacks = {part.partition(":")[0].strip() for part in text.split("|") if ":" in part}
    layers = {layer_of(name) for name in names} - {None}
    assert {layer.stack for layer in layers} == stacks
    assert {layer.depth for layer in layers} == {0, 1}


@pytest.mark.parametrize("architecture", MODELS)
def test_layers(architecture, tmp_path):
    names = class_names(architecture, tmp_path)
    blocks = blocks_of(names, "layer", tied(architecture))
    for block, members in blocks.items():
        (layer,) = {layer and layer[:2] for layer in map(layer_of, members)}
        if layer is not None:
            assert block == ".".join(map(str, layer))
    assert [name for members in blocks.values() for name in members if layer_of(name)] == [
        name for name in blocks_of(names, "tensor", False) if layer_of(name)
    ]


@pytest.mark.parametrize("architecture", MODELS)
def test_tied_groups_are_what_shares_storage(architecture):
    state = model(architecture).state_dict()
    storage = {}
    for name, tensor in state.items():
        storage.setdefault(tensor.data_ptr(), set()).add(name)
    expected = sorted((group for group in storage.values() if len(group) > 1), key=min)
    assert tied_groups(state, tied(architecture)) == expected
