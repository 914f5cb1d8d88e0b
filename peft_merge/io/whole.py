"""Whole tensors that an adapter's file carries beside its factors.

Three kinds of them replace a tensor of the base when PEFT loads the adapter: those of
`modules_to_save`, trained biases of the base (`bias: all | lora_only`), and embeddings, which PEFT
adds when they are adapted or were resized (`save_embedding_layers`). All are kept under the name of
the base's tensor that they replace, without PEFT's ``base_layer`` parts. An embedding that is only
there because it is adapted equals the base's own; it is kept nevertheless, since without the base
nobody can tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mergekit_ext.errors import Problem
from mergekit_ext.io.headers import TensorHeader
from peft_merge.io import names
from peft_merge.io.tensors import DTYPES
from peft_merge.refused import unknown_tensor

# Last part of the names of embeddings and heads, which PEFT saves when a vocabulary was resized.
EMBEDDINGS = frozenset(
    (
        *("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"),
        *("tok_embeddings", "output", "embeddings", "embedding", "decoder"),
    )
)
# What PEFT takes for the two ends of a tied embedding (`ensure_weight_tying`).
TIED = ("embed_tokens", "lm_head")
# PEFT stores `modules_to_save` twice more if their vocabulary was resized, and their biases with
# `bias: all`; neither is used.
_COPIES = (".original_module.", ".modules_to_save.")


def collect(
    config: Mapping[str, Any],
    rest: Mapping[str, TensorHeader],
    adapted: Collection[str],
    where: str,
    found: list[Problem],
) -> dict[str, TensorHeader]:
    """The whole tensors among the tensors that belong to no adapted module.

    Args:
        config: of the adapter.
        rest: by the stored name without prefix.
        adapted: the adapted modules.
        where: the file, for the messages.
        found: problems are added to it.
    """
    biases = config.get("bias", "none") != "none"
    saved: dict[str, TensorHeader] = {}
    unknown = []
    for name, header in rest.items():
        if any(name.replace(copy, ".") in rest for copy in _COPIES if copy in name):
            continue
        base = names.unwrapped(name)
        if not _known(name, base, config, biases, adapted) or base in saved:
            unknown.append(name)
        elif not _readable(header.dtype):
            found.append(
                Problem(
                    f"{where}: {name}",
                    f"dtype {header.dtype}",
                    f"one of {', '.join(DTYPES)}, or whole numbers",
                    "Save the adapter in a floating-point dtype.",
                )
            )
        else:
            saved[base] = header
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        found.append(
            Problem(
                where,
                f"{unknown[0]} ({unknown_tensor(unknown[0])}){more}",
                "factors, vectors, modules_to_save and biases that adapter_config.json names, and "
                "embeddings",
                "Save the adapter again with PEFT's save_pretrained, or merge it into its base "
                "with PEFT.",
            )
        )
    return saved


def _readable(dtype: str) -> bool:
    return dtype in DTYPES or dtype.startswith(("I", "U", "BOOL"))


def _known(
    name: str, base: str, config: Mapping[str, Any], biases: bool, adapted: Collection[str]
) -> bool:
    owner, _, leaf = base.rpartition(".")
    wrapped = names.stored(base, adapted) == name != base and leaf in ("weight", "bias")
    return (
        (biases and leaf == "bias")
        or module_to_save(base, config) is not None
        or wrapped
        or (leaf in ("weight", "bias") and owner.rpartition(".")[2] in EMBEDDINGS)
    )


def module_to_save(tensor: str, config: Mapping[str, Any]) -> str | None:
    """The entry of `modules_to_save` that a tensor of the base belongs to.

    PEFT saves every module whose name ends with an entry, with or without a dot before it.
    """
    parts = tensor.split(".")[:-1]
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for entry in config.get("modules_to_save") or ():
        if any(module.endswith(entry) for module in modules):
            return str(entry)
    return None
