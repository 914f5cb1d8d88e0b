"""The cap on the memory that a merge may hold, and the estimate that is compared with it.

A method declares how many copies of a tensor it holds (`copies`). Then a merge needs::

    what the process holds now + MARGIN + copies x bytes of the largest unit in float32 + pieces
        + inputs that are not mapped + what is kept until it is written

A unit is a tensor; for FlexMerge a block, for adapters a module. Anonymous memory counts, and on an
accelerator all inputs: the one sum holds for its memory and for the CPU's.
"""

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from mergekit_ext.errors import ConfigError, Problem

VARIABLE = "MERGEKIT_EXT_MAX_MEMORY"
# What comes on top of tensors while a merge runs: modules that are loaded late, stacks of threads,
# and what the allocator keeps (up to 32 MiB a block, which it does not give back).
MARGIN = 96 << 20
# A process that is started again may hold this much more; part of the figure that is asked for.
_STARTS_DIFFER = 4 << 20
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
# No disk or memory is so large.
_MOST = 1 << 80

# copies(models, square): of a tensor, while so many models (the base not counted) are merged.
# `square` is the squared short side of its matrices over its entries: 1 for a square matrix, 0
# for vectors and blocks.
Copies = Callable[[int, float], float]

_cap: ContextVar[int | None] = ContextVar("max_memory", default=None)


@dataclass(frozen=True)
class Need:
    """What a merge holds at its worst moment, beyond what the process holds before.

    `what` is the tensor, block or module that needs the most, `parts` are bytes by what they are
    for, and `remedy` is what would make it less.
    """

    what: str
    parts: Mapping[str, int] = field(default_factory=dict)
    remedy: str = ""

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def unknown_copies(models: int, square: float) -> float:
    """Return the copies of a method that declares none: the most that mergekit's own hold."""
    return 8 * models + 6


def copies_of(method: Any) -> Copies:
    """Return what a merge method declares as `copies`, or `unknown_copies`."""
    return getattr(method, "copies", unknown_copies)


def sides_of(shape: Sequence[int]) -> list[int]:
    """Return the short and the long side of each matrix of a tensor; three axes are a stack."""
    if len(shape) < 2 or 0 in shape:
        return [0, 1]
    return sorted(shape[-2:] if len(shape) < 4 else (shape[0], math.prod(shape[1:])))


def square_of(shape: Sequence[int]) -> float:
    """Return `square` of a tensor."""
    return sides_of(shape)[0] ** 2 / (math.prod(shape) or 1)


def working(copies: float, unit: int, models: int, piece: int, threads: int) -> dict[str, int]:
    """Return what merging one unit holds beyond its inputs and its result.

    `unit` are its bytes in float32 (float64 if an input is), `piece` those that a kernel takes at
    once which works in pieces; the base is none of the `models`.
    """
    pieces = max(2 * models + 16, 3 * threads) * min(unit, piece)
    return {f"{math.ceil(copies)} copies of it": math.ceil(copies * unit), "pieces": pieces}


@contextmanager
def limited(cap: object, where: str = "--max-memory") -> Iterator[None]:
    """Refuse merges inside that need more than `cap`; None leaves the cap as it is."""
    if cap is None:
        yield
        return
    token = _cap.set(_size(cap, where))
    try:
        yield
    finally:
        _cap.reset(token)


def held() -> int:
    """Return the anonymous memory of this process in bytes; 0 on systems without /proc."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s*(\d+)", status, re.M)
    return int(found[1]) * 1024 if found else 0


def problems(need: Need) -> Iterator[Problem]:
    """Yield what is wrong with a merge under the present cap."""
    limit, where = _cap.get(), "--max-memory"
    if limit is None:
        where, text = VARIABLE, os.environ.get(VARIABLE)
        if not text:
            return
        try:
            limit = _size(text, where)
        except ConfigError as error:
            yield from error.problems
            return
    # Give back what is free: the merge would take it again, and it would count twice.
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).malloc_trim(0)
    parts = {"what the process holds now": held(), "what comes while it runs": MARGIN, **need.parts}
    if (whole := sum(parts.values())) > limit:
        listed = ", ".join(f"{what} {size(count)}" for what, count in parts.items() if count)
        found = f"{size(limit)}, while {need.what} needs {size(whole)}: {listed}"
        yield Problem(where, found, f"{size(whole + _STARTS_DIFFER)} or more", need.remedy)


def size(count: int) -> str:
    """Return bytes in decimal units, rounded up, so that a cap of this size suffices."""
    for unit in ("TB", "GB", "MB", "KB"):
        if count >= _UNITS[unit]:
            hundredths = -(-count * 100 // _UNITS[unit])
            return f"{hundredths / 100:g}{unit.replace('K', 'k')}"
    return f"{count}B"


def in_models(size: float, digits: int = 3) -> float:
    """Return a number of models rounded up, so that a `target_size` of it holds what has `size`."""
    return math.ceil(size * 10**digits - 1e-6) / 10**digits


def count_or_bytes(value: object, expected: str) -> tuple[float | None, int | None]:
    """Read 2.25, 12000000000 or "12GB": a count and None, or None and bytes; else `ValueError`.

    "GB" is a power of 1000, "GiB" of 1024. Without a unit, bytes start at `FIRST_BYTES`.
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


def shard_size(value: str | int) -> int:
    """Read the bytes of a shard: 5000, or with a unit as in `count_or_bytes`; else `ValueError`.

    One letter is mergekit's: thousands, millions and billions, so that "5B" is "5GB".
    """
    text = str(value).strip()
    if text.isdecimal() and int(text) < _MOST:
        return int(text)
    unit = _LETTERS.get(text[-1:].upper())
    if unit and text[-2:-1].isdecimal():
        text = text[:-1] + unit
    if (count := _bytes(text)) is None:
        expected = 'a size in bytes, such as "5GB", "500MiB" or mergekit\'s "5B" (5,000,000,000)'
        raise ValueError(f"found {value!r}; expected {expected}.")
    return count


def _size(value: object, where: str) -> int:
    if (count := _bytes(value)) is None:
        expected = 'a size in bytes, such as "8GB" or "6GiB"'
        raise ConfigError([Problem(where, repr(value), expected)])
    return count


def _bytes(value: object) -> int | None:
    """Return the bytes that a text names; None if it names a count, or nothing."""
    with suppress(ValueError):
        return count_or_bytes(value, "")[1]
    return None
