"""Outputs appear whole: written beside or inside their place, then renamed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from mergekit_ext.errors import MergekitExtError, Problem
from mergekit_ext.flexmerge.manifest import SHARDS
from mergekit_ext.io import paths
from mergekit_ext.io.durable import appear, flush, flush_entries
from mergekit_ext.io.rooms import Room, hidden_room, lasting_room, left_bytes

# The files that a merge writes, and no others: a folder may hold more than one model's files.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)")
# What torch raises for accelerators, in the versions that have it.
_NAMES = ("OutOfMemoryError", "AcceleratorError")
_DEVICE = tuple(getattr(torch, name) for name in _NAMES if hasattr(torch, name))
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|unable to mmap|CUDA error")
_INDEX = re.compile(r"(pytorch_)?model\.(safetensors|bin)\.index\.json")


def output_problems(
    out_path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> Iterator[Problem]:
    """What is wrong with a place for the output.

    Args:
        out_path: the folder that will be written.
        inputs: local folders or files that the merge reads; other names are passed over.
    """
    where = "OUT_PATH"
    try:
        target = Path(out_path).resolve()
        if target.exists() and not target.is_dir():
            yield Problem(where, f"{target}, which is a file", "a folder", "Choose another name.")
            return
        # Permissions do not tell it all: nobody can make a folder in /proc.
        existing = next(folder for folder in (target, *target.parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".place-", dir=existing) as room:
            (Path(room) / target.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; no name of a file
        reason = getattr(error, "strerror", None) or error
        yield Problem(where, f"{out_path}, which cannot be made ({reason})", "a writable folder")
        return
    for name in inputs:
        try:
            source = Path(name).resolve()
        except (OSError, RuntimeError, ValueError):  # no file's name, which is said elsewhere
            continue
        replaced = source == target or (source.parent == target and _is_output(source.name))
        if replaced and paths.exists(source):
            yield Problem(
                where,
                f"{target}, where the input {name} lies",
                "a folder that no input lies in",
                "Choose another folder: the output would replace that input.",
            )


def space_problems(out_path: str | os.PathLike[str], needed: int) -> Iterator[Problem]:
    """A disk that an output of `needed` bytes does not fit on, beside what it replaces.

    What earlier runs have left in the same place counts as free: it is used, or removed.
    """
    try:
        target = Path(out_path).resolve()
        existing = next(folder for folder in (target, *target.parents) if folder.exists())
        disk = shutil.disk_usage(existing)
        free = disk.free + left_bytes(target, existing)
    except (OSError, RuntimeError, ValueError):  # no place at all, which is said elsewhere
        return
    # Some file systems do not know: they have no bytes at all.
    if disk.total and needed > free:
        yield Problem(
            "OUT_PATH",
            f"{existing}, which has {free:,} bytes left",
            f"{needed:,} bytes for the output",
            "Free some space, or choose a place on another disk.",
        )


@contextmanager
def staged(out_path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write in, of the same name as `out_path`, which it becomes at the end.

    After an exception nothing is left; what a killed process leaves, the next merge into the same
    place removes. If `out_path` is a folder already, as after an earlier
    merge, its weights give way to the new ones; other files of the same name are replaced, and the
    rest stays. What is there stays loadable, or becomes incomplete, but is never a mixture.
    """
    target, beside = _place(out_path)
    with hidden_room(target, beside) as room:
        written = written_in(room, out_path)
        yield written
        _put(written, target)


@contextmanager
def resumable(
    out_path: str | os.PathLike[str], identity: Mapping[str, str], restart: bool
) -> Iterator[Room]:
    """Like `staged`, but what is finished stays when the machine or the user stops the merge.

    The next one with the same identity gets the same room, as it was left; one with another, or
    with `restart`, removes it. `written_in` is the folder in it that becomes `out_path`.
    """
    target, beside = _place(out_path)
    with lasting_room(target, beside, identity, keeps_finished, restart) as room:
        written = written_in(room.path, out_path)
        yield room
        _put(written, target)


def keeps_finished(error: BaseException) -> bool:
    """Whether a merge that was stopped by `error` can be gone on with.

    The machine or the user stopped it, and not what is in a file, which would do so again.
    """
    if isinstance(error, MergekitExtError):
        return bool(getattr(error, "resumable", False))
    return by_machine(error) or not isinstance(error, Exception)


def by_machine(error: BaseException) -> bool:
    """Whether an error of a library is about the machine or its files: disk, memory, device."""
    if isinstance(error, (OSError, MemoryError, SafetensorError, *_DEVICE)):
        return True
    # torch has no class of its own for a CPU without memory, nor for a file that is not mapped.
    return type(error) is RuntimeError and bool(_NO_MEMORY.search(str(error)))


def written_in(room: Path, out_path: str | os.PathLike[str]) -> Path:
    """The folder in a room that becomes `out_path`, whose name it has."""
    written = room / Path(out_path).resolve().name
    written.mkdir(exist_ok=True)
    return written


def _place(out_path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The output's folder, and where it is written."""
    target = Path(out_path).resolve()
    # On the file system of the output, which may be a mount point, so that renaming is enough.
    beside = target if target.exists() else target.parent
    beside.mkdir(parents=True, exist_ok=True)
    return target, beside


def _put(written: Path, target: Path) -> None:
    if not target.exists():
        appear(written, target)
        return
    flush(written)
    old = [path for path in target.iterdir() if _is_output(path.name)]
    # The index first: without it the shards of two models cannot be taken for one.
    for path in sorted(old, key=lambda path: not _INDEX.fullmatch(path.name)):
        path.unlink()
    # And last: what makes the folder a model comes when the rest of it is there.
    for path in sorted(written.iterdir(), key=_place_in_turn):
        destination = target / path.name
        if destination.is_dir():
            shutil.rmtree(destination)
        path.replace(destination)
    flush_entries(target)


def _place_in_turn(path: Path) -> int:
    return bool(_WEIGHTS.fullmatch(path.name)) + 2 * bool(_INDEX.fullmatch(path.name))


def _is_output(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name))


def shards(folder: Path) -> list[Path]:
    """The files of weights in `folder`, in order; shared ones once."""
    shared = folder / SHARDS
    if shared.is_dir():
        return sorted(shared.iterdir())
    return sorted(path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))
