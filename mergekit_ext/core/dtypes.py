"""What dtypes are called in the safetensors format, and what can be done with them."""

from __future__ import annotations

from typing import Any

# Bits of one element, for every dtype of the format.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Elements that share bytes: no library converts them.
PACKED = frozenset(name for name, bits in BITS.items() if bits < 8)
# Floating point without arithmetic: it has to be converted first.
NARROW = PACKED | {name for name in BITS if name.startswith("F8_")}
WHOLE = frozenset(name for name in BITS if name.startswith(("I", "U", "BOOL")))
# What torch calls otherwise.
_NAMES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}


def dtype_name(dtype: Any) -> str:
    """The format's name of a torch dtype; torch's own name when it has none."""
    name = str(dtype).removeprefix("torch.")
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("float8_"):
        return "F8_" + name.removeprefix("float8_").upper()
    return name.replace("uint", "U").replace("int", "I").replace("float", "F")


def is_counter(name: str) -> bool:
    """Whether a tensor of this name counts steps of training, which no output depends on."""
    return name.rpartition(".")[2] == "num_batches_tracked"
