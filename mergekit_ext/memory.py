"""A cap on the memory that a merge may hold, and what is said where it does not suffice.

What counts is anonymous memory: what the process would have to keep if all files were closed. The
pages of files that loaders map are the system's to drop, and do not count.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_ext.budget import parse
from mergekit_ext.errors import ConfigError, Problem

VARIABLE = "MERGEKIT_EXT_MAX_MEMORY"
EXPECTED = 'a size in bytes, such as "8GB" or "6GiB"'
# What comes on top of tensors once a merge runs: modules that are loaded late, stacks and chunks
# of threads, and what the allocator keeps (up to 32 MiB a block, which it does not give back).
OVERHEAD = 96 << 20
# By which a process may hold more when it is started again, in the figure that is asked for.
_STARTS_DIFFER = 4 << 20

_cap: ContextVar[int | None] = ContextVar("max_memory", default=None)


@dataclass(frozen=True)
class Need:
    """What a merge holds at its worst moment, beyond what the process holds before.

    Attributes:
        what: the tensor, block or module that needs the most.
        parts: bytes by what they are for, in the memory of the CPU.
        device: the same on an accelerator; empty without one.
        remedy: what would make it less, as an imperative sentence.
    """

    what: str
    parts: Mapping[str, int] = field(default_factory=dict)
    device: Mapping[str, int] = field(default_factory=dict)
    remedy: str = ""

    @property
    def bytes(self) -> int:
        """All of it on the CPU."""
        return sum(self.parts.values())

    @property
    def device_bytes(self) -> int:
        """All of it on the accelerator."""
        return sum(self.device.values())


def size_in_bytes(value: object, where: str = "--max-memory") -> int:
    """Read 8000000000, "8GB" or "6GiB".

    Raises:
        ConfigError: anything else; `where` says who gave it.
    """
    try:
        _, count = parse(value, EXPECTED)
    except ValueError:
        count = None
    if count is None:
        raise ConfigError([Problem(where, repr(value), EXPECTED)])
    return count


@contextmanager
def limited(cap: object, where: str = "--max-memory") -> Iterator[None]:
    """Inside, merges are refused that need more than `cap`; None leaves the cap as it is.

    Raises:
        ConfigError: it is no size.
    """
    if cap is None:
        yield
        return
    token = _cap.set(size_in_bytes(cap, where))
    try:
        yield
    finally:
        _cap.reset(token)


def cap() -> int | None:
    """The bytes that a merge may hold; None without a limit.

    Raises:
        ConfigError: the environment names no size.
    """
    if (found := _cap.get()) is not None:
        return found
    text = os.environ.get(VARIABLE)
    return size_in_bytes(text, VARIABLE) if text else None


def held() -> int:
    """Anonymous memory of this process in bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _trim() -> None:
    """Give back what is free already: the merge would take it again, and it would count twice."""
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).malloc_trim(0)


def problems(need: Need) -> Iterator[Problem]:
    """What is wrong with a merge under the present cap: it needs more, here or on its device."""
    try:
        limit = cap()
    except ConfigError as error:
        yield from error.problems
        return
    if limit is None:
        return
    _trim()
    before = held()
    whole = before + OVERHEAD + need.bytes
    if whole > limit:
        fixed = f"{size(before)} that the process holds now, {size(OVERHEAD)} while it runs"
        parts = f"{fixed}, {_listed(need.parts)}"
        yield _short(limit, whole, need, parts, "", whole + _STARTS_DIFFER)
    if need.device_bytes > limit:
        parts = _listed(need.device)
        yield _short(limit, need.device_bytes, need, parts, " on the device", need.device_bytes)


def _short(limit: int, whole: int, need: Need, parts: str, where: str, enough: int) -> Problem:
    return Problem(
        "--max-memory" if _cap.get() is not None else VARIABLE,
        f"{size(limit)}, while {need.what} needs {size(whole)}{where}: {parts}",
        f"{size(enough)} or more{where}",
        need.remedy,
    )


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{size(count)} {what}" for what, count in parts.items() if count)


def size(count: int) -> str:
    """A number of bytes, rounded up: what it says is enough."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            hundredths = -(-count * 100 // scale)
            return f"{hundredths / 100:g}{unit}"
    return f"{-(-count // 1000)}kB"
