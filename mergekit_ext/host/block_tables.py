"""The naming habits of transformers, as tables of regular expressions.

All are searched, and ignore case. `(?:^|\\.)` and `(?:\\.|$)` stand where a whole component of the
dotted name is meant. Of a table that is ordered, the first line that is found wins.
"""

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Literal, NamedTuple

Kind = Literal["embedding", "attention", "cross_attention", "mlp", "norm", "head", "other"]


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _component(*names: str) -> str:
    """One whole component of a dotted name that is one of `names`."""
    return rf"(?:^|\.)(?:{'|'.join(names)})(?:\.|$)"


# What holds numbered layers: "layers.3." is layer 3 of the stack "layers".
STACKS = _compile(
    r"^(layers?|h|blocks?|resblocks|stages|(encoder|decoder)_layers?|albert_layer_groups)$"
)

# What holds layers inside of a numbered stage (Swin, ConvNeXt, ALBERT). The "layer.0" inside of a
# T5 block is a part of a layer, so "block" is not here.
NESTED_STACKS = frozenset(
    {("layers", "blocks"), ("stages", "layers"), ("albert_layer_groups", "albert_layers")}
)


class Slot(IntEnum):
    """The places in a layer, in the order in which data meets them."""

    BEFORE_ATTENTION = 0
    ATTENTION = 1
    WITHIN_ATTENTION = 2
    AFTER_ATTENTION = 3
    BEFORE_CROSS_ATTENTION = 4
    CROSS_ATTENTION = 5
    AFTER_CROSS_ATTENTION = 6
    BEFORE_MLP = 7
    MLP = 8
    AFTER_MLP = 9
    UNKNOWN = 10


class Component(NamedTuple):
    """One part of a layer: its block's name, its kind, its place, what its modules are called."""

    name: str
    kind: Kind
    slot: Slot
    pattern: re.Pattern[str]


_CROSS_ATTENTION = _compile(r"cross_?attn|cross_?attention|encdecattention|encoder_attn")
# Of a state space or a convolution, or the attention of the first Phi.
_MIXER = _compile(_component("mixer", "mamba", "ssm", "conv(_module)?"))
_ATTENTION = _compile(
    r"attn|attention|relative_position_bias|"
    + _component(r"att|[qkvo](_proj)?|(layer_scale_?|lambda_|ls|gamma_)1")
)
_MLP = _compile(
    r"mlp|ffn|feed_?forward|densereludense|intermediate|experts?(\.|$)|moe|router|"
    + _component("ff", r"output(?=\.)", r"(fc|lin|linear)_?\d", r"(gate|up|down)_proj")
    + "|"
    + _component(r"(layer_scale_?|lambda_|ls|gamma_)2")
)

# Searched in the module's path within its layer.
COMPONENTS: tuple[Component, ...] = (
    Component("cross_attention", "cross_attention", Slot.CROSS_ATTENTION, _CROSS_ATTENTION),
    Component("mixer", "other", Slot.ATTENTION, _MIXER),
    Component("attention", "attention", Slot.ATTENTION, _ATTENTION),
    Component("mlp", "mlp", Slot.MLP, _MLP),
)

# What sends a token to its experts, in a layer that has such; and a stack of experts, whose first
# axis counts them, which one of experts that are stored one by one is not.
ROUTER = _compile(_component("router", "gate", "gating", "shared_expert_gate"))
EXPERTS = _compile(r"(?:^|\.)experts\.(?!\d+\.)")

# A norm is known by its own module's name: "post_attention_layernorm", "ln_1", "pre_layrnorm".
NORM = _compile(r"norm|^ln\d?$|^ln_\w+$|_ln$")

# Where in its layer a norm sits; one that no line knows comes first. BART and Whisper call their
# norms alike and put them after (BART) and before (Whisper): both count as before.
NORM_SLOTS: Mapping[Slot, re.Pattern[str]] = {
    Slot.AFTER_CROSS_ATTENTION: _compile(r"cross_?attention\."),
    Slot.BEFORE_CROSS_ATTENTION: _compile(r"encoder_attn_layer_norm|cross_?attn"),
    Slot.AFTER_MLP: _compile(
        r"post_(feed_?forward|mlp)|^output\.|output_layer_norm|full_layer|^ff\."
    ),
    Slot.BEFORE_MLP: _compile(
        r"layernorm_after|norm_?2$|ln_?2$|final_layer_?norm|ln_mlp"
        r"|^(pre_)?(mlp|ffn|feed_?forward)_?(\w*norm|ln)"
    ),
    Slot.AFTER_ATTENTION: _compile(r"post_(self_)?att|sa_layer_norm|^att\w*\.(output\.)?LayerNorm"),
    Slot.WITHIN_ATTENTION: _compile(r"att\w*\."),
}

# Heads that belong to one task, by the top level of the name in transformers'
# For...Classification, ForQuestionAnswering, ForMultipleChoice and the like, timm and trl.
TASK_HEAD = _compile(
    r"^(\w*classifiers?|scores?|qa_outputs|(start|end)_logits|answer_class|logits_proj"
    r"|(\w+_)?(classification|multiple_choice|segmentation|decode|auxiliary|answer|dist|reward"
    r"|regression|value)_head|v_head|regressor|sequence_summary|fc_norm|(class|bbox)_embed"
    r"|bbox_predictor)(\.|$)"
    # These words have other uses below them or elsewhere: only one plain linear map is meant.
    r"|^(head|head\.fc|fc|projector|dense)\.(weight|bias)$"
    # Wav2Vec2's and Whisper's weights of the layers, and TAPAS's, are bare parameters.
    r"|^(layer_weights|(column_)?output_(weights|bias))$"
)

# Heads that come from pretraining and are shared by all tasks.
MODEL_HEAD = _compile(
    r"(?:^|\.)(\w*lm_head|embed_out|predictions|\w+_predictions|lm_loss|pred_layer|mlm_score)(\.|$)"
    r"|(?:^|\.)(vocab_(projector|transform|layer_norm)|output_(layer|projection))(\.|$)"
    r"|(?:^|\.)(cls|final_logits_bias)(\.|$)"
    r"|^proj_out\.|^head\.|^((model\.)?output|decoder)\.(weight|bias)$"
)

# What comes first within a head, in this order; the map to the outputs comes after these.
HEAD_SLOTS: tuple[re.Pattern[str], ...] = (
    _compile(r"^(layer_weights|fc_norm)"),
    _compile(r"^projector|^pre_|summary|_transform\.|\.dense\.|^dense\."),
    _compile(r"norm"),
)

# Outside of the layers.
EMBEDDING = _compile(
    r"embed|patch_conv"
    + "|"
    + _component("wte", "wpe", "shared", r"(cls|mask)_token", r"conv\d", "mask_emb")
    + "|"
    + _component("feature_extractor", "feature_projection", "project_in", "relative_attention_bias")
)

# Norms outside of the layers that follow the embeddings; all others follow the layers.
INPUT_NORM = _compile(
    r"embed\w*\.(\w+\.)*\w*norm$|embeddings?_layernorm|layernorm_embedding|feature_(extr|proj)"
    r"|(?:^|[._])pre_\w*norm$|ln_pre$|layernorm_pre$|^deberta\.encoder\.LayerNorm$"
)

# Parts of a model, in the order in which data goes through them; searched in one component of the
# name. Names in none of them count as `BODY`.
PARTS: tuple[tuple[int, re.Pattern[str]], ...] = (
    (0, _compile(r"^(vision|visual|image|audio|speech)(_|$)|^vision_\w+$")),
    (1, _compile(r"projector$|^connector$|^resampler$")),
    (2, _compile(r"^text_(model|encoder)$")),
    (3, _compile(r"encoder$")),
    (5, _compile(r"decoder$")),
)
BODY = 4

# Stored under several names. An input embedding of tokens, and what may share its weight.
TOKEN_EMBEDDING = _compile(
    r"(?:^|\.)(embed_tokens|shared|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed"
    r"|embeddings)\.weight$"
)
OUTPUT_EMBEDDING = _compile(
    r"(?:^|\.)(\w*lm_head(\.decoder|\.linear|\.out_proj)?|embed_out|lm_loss|pred_layer\.proj"
    r"|(predictions|mlm_score)\.decoder|vocab_projector|output_(layer|projection))\.weight$"
    r"|^proj_out\.weight$|^((model\.)?output|decoder)\.weight$"
)
# The one embedding of both encoder and decoder, and their own names for it.
SHARED_EMBEDDING = _compile(r"(?:^|\.)(?P<owner>shared|word_embeddings)\.weight$")
CODER_EMBEDDING = _compile(
    r"(?:^|\.)(?P<part>(\w+_)?(en|de)coder)\.(embed_tokens|word_embeddings)\.weight$"
)
# An output bias that the head and its decoder name each: "predictions.bias".
DECODER_BIAS = _compile(r"(?:^|\.)(predictions|\w+_head)\.decoder\.bias$")
