"""From parameter names to blocks: the parts of a model that are treated as one.

A block is one attention, one MLP, one norm of a layer, or an embedding, a final norm, a head.
The rule reads names only, so it serves every architecture that follows the naming habits of
transformers; a habit that it does not know costs a line in `_COMPONENTS`.
"""

from __future__ import annotations

import re

# Searched in this order: "attention.output.LayerNorm" is a norm before it is attention.
_COMPONENTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(^|\.)ln(_\w+)?$", re.IGNORECASE)),
    (
        "cross_attention",
        re.compile(r"crossattention|cross_attn|encdecattention|encoder_attn", re.I),
    ),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo](_proj)?(\.|$)", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_?forward|densereludense|intermediate|experts|moe|(^|\.)output\."
            r"|(^|\.)fc\d",
            re.IGNORECASE,
        ),
    ),
)

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")


def block_of(name: str) -> str:
    """Return the block that parameter `name` belongs to.

    >>> block_of("model.layers.3.self_attn.q_proj.weight")
    'model.layers.3.attention'
    >>> block_of("bert.encoder.layer.0.attention.output.LayerNorm.bias")
    'bert.encoder.layer.0.attention.output.LayerNorm'
    >>> block_of("model.embed_tokens.weight")
    'model.embed_tokens'

    Each norm is a block of its own, under its full name; attention and MLP of a layer are one
    block each; what is outside of the layers, or has no known name, is the module it sits in.
    """
    module = name.rpartition(".")[0] or name
    match = _LAYER.match(name)
    if match is None:
        return module
    inner = match["rest"].rpartition(".")[0] or match["rest"]
    for component, pattern in _COMPONENTS:
        if component == "norm":
            # Only the module itself: "post_attention_layernorm" is a norm, "norm.mlp.fc" is not.
            if pattern.search(inner.rpartition(".")[2]):
                return module
        elif pattern.search(inner):
            return f"{match['stack']}.{match['index']}.{component}"
    return module
