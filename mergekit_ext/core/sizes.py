"""What a merge may occupy, as a user writes it: so many models, or so many bytes."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_LETTERS = {"K": "KB", "M": "MB", "B": "GB"}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
# No merge has so many models or adapters, and none is so small.
FIRST_BYTES = 100_000
_SHARD_SIZE = 'a size in bytes, such as "5GB", "500MiB" or mergekit\'s "5B" (5,000,000,000)'
# No disk or memory is so large.
_MOST = 1 << 80


def parse(value: object, expected: str) -> tuple[float | None, int | None]:
    """Read 2.25, 12000000000 or "12GB" (powers of 1000; "GiB" for powers of 1024).

    Numbers without a unit are counts below `FIRST_BYTES`, and bytes from there.

    Returns:
        a count and None, or None and bytes.

    Raises:
        ValueError: anything else, with `expected` as its message.
    """
    unit = ""
    amount: float | Fraction = 0
    if isinstance(value, str):
        match = _MEMORY.fullmatch(value)
        unit = match[2].upper() if match else ""
        if match is not None and unit in _UNITS:
            # Exact: 2.3 * 10**9 in floats is a byte less.
            amount = Fraction(match[1]) * _UNITS[unit]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        amount = value
    in_bytes = bool(unit) or amount >= FIRST_BYTES
    if not 0 < amount < _MOST or (in_bytes and amount < 1):
        raise ValueError(expected)
    return (None, int(amount)) if in_bytes else (float(amount), None)


def in_units(count: int) -> str:
    """Return a number of bytes in decimal units, as disks are sold and shards are counted."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def shard_size(value: str | int) -> int:
    """Read the bytes of a shard: 5000, or with a unit as in `parse`.

    One letter is mergekit's: thousands, millions and billions, so that "5B" is "5GB".

    Raises:
        ValueError: anything else; its message says what was found and expected.
    """
    text = str(value).strip()
    if text.isdecimal() and int(text) < _MOST:
        return int(text)
    unit = _LETTERS.get(text[-1:].upper())
    try:
        _, count = parse(text[:-1] + unit if unit and text[-2:-1].isdecimal() else text, "")
    except ValueError:
        count = None
    if count is None:
        raise ValueError(f"found {value!r}; expected {_SHARD_SIZE}.")
    return count
