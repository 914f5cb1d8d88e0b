"""Headers of weight files, read without touching the weights. Nothing in them is trusted."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mergekit_ext.errors import FileError, listing, one_line
from mergekit_ext.io.documents import bounded_text, parse_json, regular
from mergekit_ext.io.model_files import is_inside

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST = 200  # of a library's message
_LARGEST_INDEX = 64 << 20  # some 10 MB are 100,000 tensors
_COMPARED = 1 << 20
# As far as torch counts.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 2**63 - 1
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
    "Ask for safetensors; or, if you trust its author, give --allow-pickle (Python: allow_pickle, "
    f"mergekit's own commands: {PICKLES_VARIABLE}=1): only tensors are read from it."
)

_pickles: ContextVar[bool] = ContextVar("allow_pickle", default=False)


@contextmanager
def allowing_pickles(asked: bool) -> Iterator[None]:
    """Accept pickles inside if `asked`; torch's restricted unpickler reads tensors from them."""
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
    """One tensor that is stored, or will be; `dtype` is the name in the safetensors format.

    Its bytes start at `offset` in `file`: None in a pickle, on the Hub, or before it is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None
    offset: int = 0

    @classmethod
    def of(cls, name: str, dtype: Any, shape: Sequence[int]) -> "TensorHeader":
        return cls(name, dtype_name(dtype), tuple(shape), math.prod(shape) * dtype.itemsize)

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def stored(self) -> "tuple[TensorHeader, ...]":
        """The tensor, or what it is made of."""
        return (self,)

    def load(self) -> "Tensor":
        """Return the tensor, mapped; its file is a safetensors file."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)


def read_safetensors(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file that its library accepts, or raise `FileError`."""
    try:
        regular(path)
        with safe_open(path, "np"), path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            text = file.read(start - 8).decode("utf-8")
        header = parse_json(text, unique=True)  # the library takes the last of equal names
        if not text.startswith("{"):
            raise ValueError("the header does not begin with {")
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            # The library takes a list for an entry, too, and {"F32": null} for a dtype.
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            known = dtype in BITS and len(shape) <= _MOST_DIMENSIONS
            if not known or max(shape, default=0) > _MOST_ELEMENTS:
                raise ValueError(f"a dtype or a shape of {name} that no tensor has")
            place = (end - begin, path, start + begin)
            found[name] = TensorHeader(name, dtype, shape, *place)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        found_there = f"no safetensors file ({str(error)[:_LONGEST]})"
        expected = "a whole one, as its library wrote it"
        raise FileError(str(path), found_there, expected, _COPY_AGAIN) from error
    return found


def read_folder(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Return the tensors that mergekit would read in a model's folder.

    Raises:
        FileError: for the first file that is wrong, when there are no weights, or when
            transformers would read other tensors than mergekit.
    """
    weights = weights_of(folder)
    if weights is None:
        files = ", ".join(f"{name}, {name}.index.json" for name in WEIGHT_FILES)
        remedy = "Give the folder of a whole model, as save_pretrained writes it."
        raise FileError(str(folder), "no weights", f"one of {files}", remedy)
    if not weights.name.endswith(".index.json"):
        return read_file(weights, allow_pickle=allow_pickle)
    shards: dict[str, set[str]] = defaultdict(set)
    for tensor, shard in read_index(weights).items():
        shards[shard].add(tensor)
    # `save_pretrained` leaves the single file of an earlier save where it is.
    single = weights.with_name(weights.name.removesuffix(".index.json"))
    if single.exists() and {*shards} != {single.name}:
        count = f"{len(shards)} shard{'s' if len(shards) != 1 else ''}"
        found = f"{single.name}, which transformers loads, beside {weights.name}, whose {count}"
        remedy = f"Remove {single.name} if the shards are the model, or else {weights.name}."
        raise FileError(str(folder), f"{found} mergekit reads", "one of the two", remedy)
    headers: dict[str, TensorHeader] = {}
    for shard, listed in sorted(shards.items()):
        tensors = read_file(folder / shard, allow_pickle=allow_pickle)
        if wrong := listed ^ tensors.keys():
            found = f"{listing(sorted(wrong))}, in only one of this file and {weights.name}"
            others = "transformers would load other tensors than mergekit"
            expected = f"the {len(listed)} tensors that {weights.name} places there, and no others"
            remedy = "Copy the file again, or save the model again into an empty folder."
            raise FileError(str(folder / shard), f"{found}: {others}", expected, remedy)
        headers |= tensors
    return headers


def weights_of(folder: Path) -> Path | None:
    """Return the index or the file that mergekit would read."""
    for name in WEIGHT_FILES:
        for candidate in (folder / f"{name}.index.json", folder / name):
            if candidate.exists():
                return candidate
    return None


def read_file(path: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Return the tensors of one weight file."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not allow_pickle:
        raise FileError(str(path), PICKLE_FOUND, "safetensors", PICKLE_REMEDY)
    return read_pickle(path)


def read_pickle(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a PyTorch file, by torch's restricted unpickler and mmap."""
    import torch

    try:
        regular(path)
        # Neither code nor weights are loaded: mmap leaves the storages on disk.
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds; its message is kept
        # Not what torch then advises, which is to let the file run what it wants.
        found = f"a file that torch.load refuses ({one_line(error).partition('Re-running')[0]})"
        expected, remedy = "a PyTorch file that holds tensors only", "Save it as safetensors."
        raise FileError(str(path), found, expected, remedy) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    return {
        name: TensorHeader.of(name, value.dtype, value.shape)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def read_index(path: Path) -> dict[str, str]:
    """Return the tensors of an index and the shard of each, which exists and is in the folder."""
    try:
        weight_map = parse_json(bounded_text(path, _LARGEST_INDEX), unique=True)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("an empty `weight_map`")
        "".join([*weight_map, *weight_map.values()]).encode()  # texts, no half of a surrogate pair
    except (OSError, ValueError, KeyError, TypeError) as error:
        found, expected = f"an index that cannot be read ({error!r})", "JSON with a `weight_map`"
        raise FileError(str(path), found, expected, _COPY_AGAIN) from error
    for shard in sorted(set(weight_map.values())):
        # Each other way to write a name would be read as one more shard.
        if not is_inside(shard) or PurePosixPath(shard).as_posix() != shard:
            found = f"the shard {shard!r}, which is no plain name of a file inside of its folder"
            remedy = "Do not use this model unless you know who wrote the index."
            raise FileError(str(path), found, "plain names", remedy)
        if not os.path.isfile(path.parent / shard):
            found = f"the shard {shard!r}, which does not exist"
            raise FileError(str(path), found, "every shard in the folder", _COPY_AGAIN)
    return weight_map


def same_bytes(one: TensorHeader, other: TensorHeader) -> bool:
    """Return whether two tensors are stored alike; those of pickles, at no known place, are not."""
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
