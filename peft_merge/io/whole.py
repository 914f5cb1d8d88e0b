"""Whole tensors that an adapter's file carries beside its factors.

Three kinds of them replace a tensor of the base when PEFT loads the adapter: those of
`modules_to_save`, trained biases of the base (`bias: all | lora_only`), and embeddings, which PEFT
adds when they are adapted or were resized (`save_embedding_layers`). All are kept under the name of
the base's tensor that they replace, without PEFT's ``base_layer`` parts. An embedding that is only
there because it is adapted equals the base's own; it is kept nevertheless, since the base is not
read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peft_merge.io import names

# Last part of the names of embeddings and heads, which PEFT saves when a vocabulary was resized.
EMBEDDINGS = frozenset(
    (
        *("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"),
        *("tok_embeddings", "output", "embeddings", "embedding", "decoder"),
    )
)
# What PEFT takes for the two ends of a tied embedding (`ensure_weight_tying`).
TIED = ("embed_tokens", "lm_head")


def is_whole(name: str, config: Mapping[str, Any], adapted: Collection[str]) -> bool:
    """Return whether a stored tensor, by its name without prefix, replaces one of the base."""
    base = names.unwrapped(name)
    owner, _, leaf = base.rpartition(".")
    if config.get("bias", "none") != "none" and leaf == "bias":
        return True
    if module_to_save(base, config) is not None:
        return True
    wrapped = names.stored(base, adapted) == name != base
    return leaf in ("weight", "bias") and (wrapped or owner.rpartition(".")[2] in EMBEDDINGS)


def module_to_save(tensor: str, config: Mapping[str, Any]) -> str | None:
    """Return the entry of `modules_to_save` that a tensor of the base belongs to.

    PEFT saves every module whose name ends with an entry, with or without a dot before it.
    """
    parts = tensor.split(".")[:-1]
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for entry in config.get("modules_to_save") or ():
        if any(module.endswith(entry) for module in modules):
            return str(entry)
    return None
