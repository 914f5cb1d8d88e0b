"""Hostile and broken weight files, made from a sound safetensors file. Nothing here is large."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What becomes of the bytes of a sound file.
Attack = Callable[[bytes], bytes]


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    """A file of any header: JSON, or text as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entries(change: Callable[[dict[str, Any], list[str]], object]) -> Attack:
    """Change the header's entries; the second argument holds the names in order of their bytes."""

    def attack(content: bytes) -> bytes:
        header, data = split(content)
        names = sorted(
            (name for name in header if name != "__metadata__"),
            key=lambda name: header[name]["data_offsets"],
        )
        change(header, names)
        return joined(header, data)

    return attack


def _field(field: str, value: Any) -> Attack:
    return _entries(lambda header, names: header[names[0]].update({field: value}))


def _renamed(new: str) -> Attack:
    def change(header: dict[str, Any], names: list[str]) -> None:
        # Not the first, which may be a head that is tied and need not be there.
        header[new] = header.pop(names[1])

    return _entries(change)


def _overlap(header: dict[str, Any], names: list[str]) -> None:
    first, second = (header[name]["data_offsets"] for name in names[:2])
    shift = min(4, second[1] - second[0])
    header[names[1]]["data_offsets"] = [second[0] - shift, second[1] - shift]
    assert first[1] > second[0] - shift


def _gap(content: bytes) -> bytes:
    header, data = split(content)
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return joined(header, bytes(8) + data)


def _twice(content: bytes) -> bytes:
    header, data = split(content)
    name = next(name for name in header if name != "__metadata__")
    once = json.dumps(header)
    again = f"{json.dumps(name)}: {json.dumps(header[name])}"
    return joined(f"{once[:-1]}, {again}}}".encode(), data)


def _flipped(position: int) -> Attack:
    def attack(content: bytes) -> bytes:
        spoilt = bytearray(content)
        spoilt[position] ^= 0x41
        return bytes(spoilt)

    return attack


def _deep(content: bytes) -> bytes:
    return joined(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, split(content)[1])


ATTACKS: dict[str, Attack] = {
    "metadata a text": _entries(lambda header, names: header.update(__metadata__="*")),
    "metadata false": _entries(lambda header, names: header.update(__metadata__=False)),
    "metadata of numbers": _entries(lambda header, names: header.update(__metadata__={"a": 1})),
    "metadata with half a surrogate": _entries(
        lambda header, names: header.update(__metadata__={"\ud800": "pt"})
    ),
    "spaces first": lambda content: joined(
        b" " + json.dumps(split(content)[0]).encode(), split(content)[1]
    ),
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "cut in the header": lambda content: content[:40],
    "cut in the data": lambda content: content[:-3],
    "something after the end": lambda content: content + b"more",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>404 Not Found</html>" * 10,
    "length flipped": _flipped(0),
    "length huge": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "length of the whole file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "brace flipped": _flipped(8),
    "not UTF-8": lambda content: joined(b'{"\xff\xfe": 1}', b""),
    "not JSON": lambda content: joined(b"{'a': 1}", b""),
    "a list": lambda content: joined([1, 2], b""),
    "null": lambda content: joined(None, b""),
    "NaN": lambda content: joined(b'{"a": NaN}', b""),
    "nested deeply": _deep,
    "entry is a number": _entries(lambda header, names: header.update({names[0]: 3})),
    "entry is null": _entries(lambda header, names: header.update({names[0]: None})),
    "entry is a list": _entries(
        lambda header, names: header.update({names[0]: [*header[names[0]].values()]})
    ),
    "name twice": _twice,
    "overlap": _entries(_overlap),
    "same bytes for two": _entries(
        lambda header, names: header.update({"copy": dict(header[names[0]])})
    ),
    "gap": _gap,
    "offsets backwards": _entries(lambda header, names: header[names[0]]["data_offsets"].reverse()),
    "offsets negative": _field("data_offsets", [-4, 0]),
    "offsets behind the end": _field("data_offsets", [0, 2**60]),
    "offsets of texts": _field("data_offsets", ["0", "4"]),
    "offsets of floats": _field("data_offsets", [0.0, 4.0]),
    "one offset": _field("data_offsets", [0]),
    "shape of 10^15 elements": _field("shape", [10**15]),
    "shape of many axes": _field("shape", [1] * 10_000),
    "shape that overflows": _field("shape", [2**40, 2**40]),
    "shape of huge numbers": _field("shape", [10**4000] * 50),
    "shape negative": _field("shape", [-1, -1]),
    "shape of booleans": _field("shape", [True]),
    "shape a text": _field("shape", "44"),
    "shape null": _field("shape", None),
    "dtype unknown": _field("dtype", "F31"),
    "dtype a list": _field("dtype", ["F32"]),
    "dtype an object": _field("dtype", {"F32": 1}),
    "dtype an object of null": _field("dtype", {"F32": None}),
    "dtype null": _field("dtype", None),
    "dtype long": _field("dtype", "F" * 1_000_000),
    "dtype wider than the bytes": _field("dtype", "F64"),
    "name half a surrogate": _renamed("\ud800"),
}

# Sound files of the format whose names are a trap. A reader that knows which names there
# must be refuses them; none takes them for paths.
NAMES: dict[str, Attack] = {
    "name with a path": _renamed("../../../../etc/passwd"),
    "absolute name": _renamed("/etc/passwd"),
    "backslashes": _renamed("..\\..\\evil"),
    "NUL": _renamed("a\0b"),
    "escape sequence": _renamed("\x1b[2J\x1b[31mowned"),
    "line breaks": _renamed("a\nError: none\r\n"),
    "empty name": _renamed(""),
    "long name": _renamed("n" * 1_000_000),
}


class _Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def malicious_pickle(mark: Path) -> bytes:
    """A pickle that makes the file `mark` when it is unpickled."""
    return pickle.dumps({"weight": _Runs(mark)})


def malicious_checkpoint(mark: Path) -> bytes:
    """The same in a file as torch.save writes it."""
    made = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "payload": _Runs(mark)}, made)
    return made.getvalue()
