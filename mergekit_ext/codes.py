"""Stored codes: the tensors of quantised checkpoints, which are no weights.

Codes are numbers only together with their scales. Averaged without them they give a model that
loads and answers nonsense, so every command refuses them before any work.
"""

from __future__ import annotations

import re
from collections.abc import Collection

REMEDY = "Give the model as it was before quantisation, or dequantise it and save that."
# Scales, zero points and tables as their writers name them: compressed-tensors, fine-grained fp8,
# bitsandbytes, MXFP4, torchao, quanto. `of` is what they belong to.
_BESIDE = re.compile(
    r"(?P<of>.+?)(?:_(?:scale|scale_inv|scales|zero_point|global_scale|blocks)"
    r"|\.(?:absmax|quant_map|quant_state\..+|SCB|_scale|_zero_point)|:_?(?:scale|qdata))"
)
# GPTQ, AWQ, HQQ, compressed-tensors: packed codes have names of their own.
_PACKED = re.compile(r".*\.(?:qweight|qzeros|W_q|weight_packed)")


def stored_codes(names: Collection[str]) -> list[str]:
    """Return those of `names` that hold scales or packed codes.

    A scale is one only beside the tensor that it scales: models have parameters of such names.
    """
    stored = frozenset(names)
    return [name for name in names if _PACKED.fullmatch(name) or _scales(name, stored)]


def _scales(name: str, stored: frozenset[str]) -> bool:
    found = _BESIDE.fullmatch(name)
    if found is None:
        return False
    codes = (f"{found['of']}{end}" for end in ("", ".weight", "_blocks", "._data", ":qdata"))
    return any(code in stored and code != name for code in codes)
