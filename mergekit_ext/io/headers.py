"""Headers of weight files, read without touching the weights.

A safetensors file starts with 8 bytes of length and a JSON object: name, dtype, shape and byte
range of every tensor. Nothing in it is trusted.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from mergekit_ext.io.schema import no_repeats

_LONGEST = 200  # of a library's message
_LARGEST_INDEX = 64 << 20  # some 10 MB are 100,000 tensors
_COMPARED = 1 << 20
# As far as torch counts.
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**63 - 1
# Where mergekit looks, in its order.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

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

PICKLES_VARIABLE = "MERGEKIT_EXT_ALLOW_PICKLE"
PICKLE_FOUND = "a pickle, which may run any code when it is read"
PICKLE_REMEDY = (
    "Ask for safetensors; or, if you trust its author, give --allow-pickle (in Python "
    f"allow_pickle, for mergekit's own commands {PICKLES_VARIABLE}=1): only tensors are read "
    "from it."
)

_asked: ContextVar[bool] = ContextVar("allow_pickle", default=False)


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


@contextmanager
def allowing_pickles(asked: bool) -> Iterator[None]:
    """Inside, checks take pickles if `asked`; otherwise nothing changes."""
    token = _asked.set(_asked.get() or asked)
    try:
        yield
    finally:
        _asked.reset(token)


def pickles_allowed() -> bool:
    """Whether they are asked for, here or in the environment."""
    return _asked.get() or os.environ.get(PICKLES_VARIABLE) == "1"


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor. `dtype` is the name in the safetensors format.

    `file` and `offset` say where its bytes start; None for tensors in a pickle or on the Hub.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None
    offset: int = 0

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


class HeaderError(Exception):
    """A weight file that cannot be used: what was found, what should be, and what to do."""

    def __init__(self, file: str, found: str, expected: str, remedy: str = ""):
        super().__init__(f"{file}: found {found}; expected {expected}")
        self.file, self.found, self.expected = file, found, expected
        self.remedy = remedy or "Copy or download the file again."


def read_safetensors(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file, after the library has verified it."""
    try:
        _regular(path)
        with safe_open(path, framework="numpy"):
            pass  # it compares every length and range with the file
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            raw = file.read(length)
        if not raw.startswith(b"{"):
            raise ValueError("the header is not an object")
        header = json.loads(raw, object_pairs_hook=no_repeats)
        header.pop("__metadata__", None)
        return {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except (OSError, ValueError, SafetensorError) as error:
        found = f"no safetensors file ({str(error)[:_LONGEST]})"
        raise HeaderError(str(path), found, "a whole one, as its library wrote it") from error


def _entry(path: Path, name: str, entry: Mapping[str, Any], start: int) -> TensorHeader:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in BITS:
        raise ValueError(f"the unknown dtype {entry['dtype']} of {name}")
    if len(shape) > _MOST_DIMENSIONS or max(shape, default=0) > _MOST_ELEMENTS:
        raise ValueError(f"a shape of {name} that no tensor has")
    return TensorHeader(name, entry["dtype"], shape, end - begin, path, start + begin)


def read_folder(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Read the headers of the weights that mergekit would read in a model's folder.

    Raises:
        HeaderError: for the first file that is wrong, when there are no weights, or when
            transformers would read other tensors than mergekit (`_require_one_reading`).
    """
    weights = weights_of(folder)
    if weights is None:
        raise HeaderError(
            str(folder),
            "no weights",
            f"one of {', '.join(f'{name}, {name}.index.json' for name in WEIGHT_FILES)}",
            "Give the folder of a whole model, as save_pretrained writes it.",
        )
    if not weights.name.endswith(".index.json"):
        return read_file(weights, allow_pickle=allow_pickle)
    wanted = read_index(weights)
    shards: dict[str, list[str]] = {}
    for tensor, shard in wanted.items():
        shards.setdefault(shard, []).append(tensor)
    _require_one_reading(weights, set(shards))
    found: dict[str, TensorHeader] = {}
    for shard, listed in sorted(shards.items()):
        tensors = read_file(folder / shard, allow_pickle=allow_pickle)
        missing = [tensor for tensor in listed if tensor not in tensors]
        if missing:
            raise HeaderError(
                str(folder / shard),
                f"no tensor {missing[0]} ({len(missing)} are missing)",
                f"all {len(listed)} tensors that {weights.name} places there",
            )
        more = [tensor for tensor in tensors if wanted.get(tensor) != shard]
        if more:
            raise HeaderError(
                str(folder / shard),
                f"{more[0]} ({len(more)} in all), which {weights.name} does not place there: "
                "transformers would load it, mergekit would not",
                f"the {len(listed)} tensors that {weights.name} places there, and no others",
                "Save the model again with `save_pretrained` into an empty folder.",
            )
        found |= tensors
    return found


def _require_one_reading(index: Path, shards: Collection[str]) -> None:
    """Refuse an index beside a single file, which transformers reads and mergekit does not.

    `save_pretrained` leaves such a file of an earlier save where it is.
    """
    single = index.with_name(index.name.removesuffix(".index.json"))
    if single.exists() and shards != {single.name}:
        raise HeaderError(
            str(index.parent),
            f"{single.name}, which transformers loads, beside {index.name}, whose {len(shards)} "
            f"shard{'s' if len(shards) != 1 else ''} mergekit reads",
            "one of the two",
            f"Remove {single.name} if the shards are the model, or else {index.name}.",
        )


def weights_of(folder: Path) -> Path | None:
    """The index or the file that mergekit would read; an index wins over a single file."""
    for name in WEIGHT_FILES:
        for candidate in (folder / f"{name}.index.json", folder / name):
            if candidate.exists():
                return candidate
    return None


def read_file(path: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Headers of one weight file: safetensors, or a pickle if that is allowed."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not allow_pickle:
        raise HeaderError(str(path), PICKLE_FOUND, "safetensors", PICKLE_REMEDY)
    return read_pickle(path)


def read_pickle(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes of a PyTorch file, by torch's restricted unpickler and mmap."""
    import torch

    try:
        _regular(path)
        # Neither code nor weights are loaded: mmap leaves the storages on disk.
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds; its message is kept
        # Not what torch then advises, which is to let the file run what it wants.
        first = (str(error).splitlines() or [""])[0].partition("Re-running")[0].strip()
        raise HeaderError(
            str(path),
            f"a file that torch.load refuses ({type(error).__name__}: {first})",
            "a PyTorch file that holds tensors only",
            "Save the model as safetensors.",
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    return {
        name: TensorHeader(
            name, dtype_name(value.dtype), tuple(value.shape), value.numel() * value.element_size()
        )
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def read_index(path: Path) -> dict[str, str]:
    """The tensors of an index and the shard of each, verified to stay inside of the folder."""
    try:
        if (size := _regular(path).st_size) > _LARGEST_INDEX:
            raise ValueError(f"{size:,} bytes, more than {_LARGEST_INDEX:,}")
        text = path.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=no_repeats)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HeaderError(
            str(path), f"an index that cannot be read ({error!r})", "JSON with a `weight_map`"
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(str(path), "an empty `weight_map`", "a file name for every tensor")
    if not all(_is_unicode(item) for pair in weight_map.items() for item in pair):
        raise HeaderError(str(path), "names that are no texts", "a file name for every tensor")
    for shard in sorted(set(weight_map.values())):
        posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
        if posix.is_absolute() or windows.anchor or ".." in posix.parts + windows.parts:
            raise HeaderError(
                str(path),
                f"the shard {shard!r}, outside of the model's folder",
                "file names inside of it",
                "Do not use this model unless you know who wrote the index.",
            )
        if posix.as_posix() != shard:  # each way to write one file would have it read again
            expected = f"the file's name alone, {posix.as_posix()!r}"
            raise HeaderError(str(path), f"the shard {shard!r}", expected)
        if not os.path.isfile(path.parent / shard):
            raise HeaderError(
                str(path),
                f"the shard {shard!r}, which does not exist",
                "every shard in the folder",
            )
    return weight_map


def _is_unicode(text: object) -> bool:
    """Whether it is a text without half of a surrogate pair, which no output can hold."""
    return isinstance(text, str) and text.encode("utf-8", "replace").decode() == text


def _regular(path: Path) -> os.stat_result:
    """The state of a file; opening a pipe would wait for its other end."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError("not a regular file")
    return state


def same_bytes(one: TensorHeader, other: TensorHeader) -> bool:
    """Return whether two tensors are stored alike; those of a pickle, at no known place, differ."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not (one.file and other.file):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        remaining = one.nbytes
        while remaining:
            size = min(remaining, _COMPARED)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True
