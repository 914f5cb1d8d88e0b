"""Headers of weight files, read without touching the weights.

A safetensors file starts with 8 bytes of length and a JSON object: name, dtype, shape and byte
range of every tensor. Nothing in it is trusted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_ext.errors import FileError
from mergekit_ext.io.documents import bounded_text, parse_json, regular
from mergekit_ext.io.model_files import is_inside

_LONGEST = 200  # of a library's message
_LARGEST_HEADER = 100_000_000  # as for the library of the format
_LARGEST_INDEX = 64 << 20  # some 10 MB are 100,000 tensors
_COMPARED = 1 << 20
# As far as torch counts.
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**63 - 1
# Where mergekit looks, in its order.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_COPY_AGAIN = "Copy or download the file again."

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

_pickles: ContextVar[bool] = ContextVar("allow_pickle", default=False)


@contextmanager
def allowing_pickles(asked: bool) -> Iterator[None]:
    """Inside, checks take pickles if `asked`; otherwise nothing changes.

    torch's restricted unpickler reads them and makes tensors only; that it has no holes is what is
    trusted.
    """
    token = _pickles.set(_pickles.get() or asked)
    try:
        yield
    finally:
        _pickles.reset(token)


def pickles_allowed() -> bool:
    """Return whether pickles are asked for, here or in the environment."""
    return _pickles.get() or os.environ.get(PICKLES_VARIABLE) == "1"


def dtype_name(dtype: Any) -> str:
    """Return the format's name of a torch dtype; torch's own name when it has none."""
    name = str(dtype).removeprefix("torch.")
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("float8_"):
        return "F8_" + name.removeprefix("float8_").upper()
    return name.replace("uint", "U").replace("int", "I").replace("float", "F")


def is_counter(name: str) -> bool:
    """Return whether a tensor counts steps of training, which no output depends on."""
    return name.rpartition(".")[2] == "num_batches_tracked"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor that is stored, or will be. `dtype` is the name in the safetensors format.

    `file` and `offset` say where its bytes start; None for tensors in a pickle or on the Hub, and
    for those that are not written yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None
    offset: int = 0

    @classmethod
    def of(cls, name: str, dtype: Any, shape: Sequence[int]) -> TensorHeader:
        """Return the header of a tensor of a torch dtype."""
        return cls(name, dtype_name(dtype), tuple(shape), math.prod(shape) * dtype.itemsize)

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


def read_safetensors(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file.

    Raises:
        FileError: it is not one that the format's library would read: lengths, dtypes, shapes and
            byte ranges, which must follow each other without gaps up to the end of the file.
    """
    try:
        size = regular(path).st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > min(size, _LARGEST_HEADER):
                raise ValueError("the length of the header is wrong")
            text = file.read(start - 8).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("the header is not an object")
        header = parse_json(text, unique=True)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are no texts")
        "".join([*header, *metadata, *metadata.values()]).encode()  # no half of a surrogate pair
        found = {name: _entry(path, name, entry, start) for name, entry in header.items()}
        end = start
        for tensor in sorted(found.values(), key=attrgetter("offset", "nbytes")):
            if tensor.offset != end:
                raise ValueError(f"the bytes of {tensor.name} are not behind those before it")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"{end:,} bytes in the header, {size:,} in the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found_there = f"no safetensors file ({str(error)[:_LONGEST]})"
        expected = "a whole one, as its library wrote it"
        raise FileError(str(path), found_there, expected, _COPY_AGAIN) from error
    return found


def _entry(path: Path, name: str, entry: Mapping[str, Any], start: int) -> TensorHeader:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > _MOST_DIMENSIONS or not all(map(_is_size, (*shape, begin, end))):
        raise ValueError(f"a shape or a place of {name} that no tensor has")
    if dtype not in BITS:
        raise ValueError(f"the unknown dtype {dtype} of {name}")
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{name} has another size than its shape and dtype")
    return TensorHeader(name, dtype, shape, end - begin, path, start + begin)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_ELEMENTS


def read_folder(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Read the headers of the weights that mergekit would read in a model's folder.

    Raises:
        FileError: for the first file that is wrong, when there are no weights, or when
            transformers would read other tensors than mergekit.
    """
    weights = weights_of(folder)
    if weights is None:
        raise FileError(
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
    _require_one_reading(weights, shards)
    found: dict[str, TensorHeader] = {}
    for shard, listed in sorted(shards.items()):
        tensors = read_file(folder / shard, allow_pickle=allow_pickle)
        missing = [tensor for tensor in listed if tensor not in tensors]
        if missing:
            raise FileError(
                str(folder / shard),
                f"no tensor {missing[0]} ({len(missing)} are missing)",
                f"all {len(listed)} tensors that {weights.name} places there",
                _COPY_AGAIN,
            )
        more = [tensor for tensor in tensors if wanted.get(tensor) != shard]
        if more:
            raise FileError(
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
    if single.exists() and {*shards} != {single.name}:
        raise FileError(
            str(index.parent),
            f"{single.name}, which transformers loads, beside {index.name}, whose {len(shards)} "
            f"shard{'s' if len(shards) != 1 else ''} mergekit reads",
            "one of the two",
            f"Remove {single.name} if the shards are the model, or else {index.name}.",
        )


def weights_of(folder: Path) -> Path | None:
    """Return the index or the file that mergekit would read; an index wins over a single file."""
    for name in WEIGHT_FILES:
        for candidate in (folder / f"{name}.index.json", folder / name):
            if candidate.exists():
                return candidate
    return None


def read_file(path: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Read the header of one weight file: safetensors, or a pickle if that is allowed."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not allow_pickle:
        raise FileError(str(path), PICKLE_FOUND, "safetensors", PICKLE_REMEDY)
    return read_pickle(path)


def read_pickle(path: Path) -> dict[str, TensorHeader]:
    """Read names, shapes and dtypes of a PyTorch file, by torch's restricted unpickler and mmap."""
    import torch

    try:
        regular(path)
        # Neither code nor weights are loaded: mmap leaves the storages on disk.
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds; its message is kept
        # Not what torch then advises, which is to let the file run what it wants.
        first = (str(error).splitlines() or [""])[0].partition("Re-running")[0].strip()
        raise FileError(
            str(path),
            f"a file that torch.load refuses ({type(error).__name__}: {first})",
            "a PyTorch file that holds tensors only",
            "Save the model as safetensors.",
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    return {
        name: TensorHeader.of(name, value.dtype, value.shape)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def read_index(path: Path) -> dict[str, str]:
    """Return the tensors of an index and the shard of each, verified to stay in the folder.

    Raises:
        FileError: it is no index, or names files that are not there.
    """
    try:
        weight_map = parse_json(bounded_text(path, _LARGEST_INDEX), unique=True)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("an empty `weight_map`")
        "".join([*weight_map, *weight_map.values()]).encode()  # texts, no half of a surrogate pair
    except (OSError, ValueError, KeyError, TypeError) as error:
        found, expected = f"an index that cannot be read ({error!r})", "JSON with a `weight_map`"
        raise FileError(str(path), found, expected, _COPY_AGAIN) from error
    for shard in sorted(set(weight_map.values())):
        if not is_inside(shard):
            raise FileError(
                str(path),
                f"the shard {shard!r}, outside of the model's folder",
                "file names inside of it",
                "Do not use this model unless you know who wrote the index.",
            )
        if (name := PurePosixPath(shard).as_posix()) != shard:  # each way to write it is read again
            expected = f"the file's name alone, {name!r}"
            raise FileError(str(path), f"the shard {shard!r}", expected, _COPY_AGAIN)
        if not os.path.isfile(path.parent / shard):
            found = f"the shard {shard!r}, which does not exist"
            raise FileError(str(path), found, "every shard in the folder", _COPY_AGAIN)
    return weight_map


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
