"""Outputs appear whole: written in a staging directory, flushed to the disk, then renamed.

The staging directory of an output is hidden and lies beside it. It holds::

    .lock           locked while a process writes the output; a process that ends gives it up
    identity.json   what decides the bytes of the output, if a later process may continue
    journal-*       the finished pieces (`mergekit_ext.io.journal`)
    <name>/         what becomes the output

A killed process leaves it; the next one continues in it if its identity is the same.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from mergekit_ext.errors import ConfigError, MergekitExtError, Problem, require
from mergekit_ext.io.documents import StrPath, json_object

# The weights that a merge writes, and no others: a folder may hold files of several models.
WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)")
_INDEX = re.compile(r"(pytorch_)?model\.(safetensors|bin)\.index\.json")
# What makes a folder one of another kind than a model.
KINDS = ("adapter_config.json", "flexmerge.json")
_LOCK, _MARKER, _IDENTITY, _SUFFIX = ".lock", ".locked", "identity.json", "-incomplete"
_CHOOSE = "Choose another folder."
_LARGEST_IDENTITY = 1 << 24  # some hundred characters for each input
# Errors of file systems without locks, and of those that cannot be asked to flush.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP}
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}
# torch has no class of its own for a CPU without memory, nor for a file that is not mapped.
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|unable to mmap|CUDA error")


@dataclass(frozen=True)
class Staging:
    """A staging directory in use."""

    path: Path
    output: Path  # in it; becomes the output, whose name it has
    changed: tuple[str, ...] = ()  # the parts of the identity by which what was left differs
    replaces: bool = False  # weights that are in the output's place


@contextmanager
def staged(
    out_path: StrPath, identity: Mapping[str, str] | None = None, restart: bool = False
) -> Iterator[Staging]:
    """Yield a staging directory whose `output` replaces `out_path` at the end.

    If `out_path` is a folder already, its weights give way to the new ones, other files of the same
    name are replaced, and the rest stays: it stays loadable, or becomes incomplete, but is never a
    mixture. After an error nothing is left, unless the machine or the user stopped the work
    (`is_resumable`) and there is an `identity`: whatever decides the output, by names that a user
    understands. `restart` removes what is left, whatever its identity.
    """
    target = Path(out_path).resolve()
    staging = _directory(target)
    missing = [folder for folder in staging.parents if not folder.exists()]
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        with _locked(staging, target):
            output = staging / target.name
            changed = None if identity is None else _differences(staging, identity)
            try:
                if changed != () or restart or output.is_symlink() or not output.is_dir():
                    _clear(staging)
                    output.mkdir()
                    if identity is not None:
                        text = json.dumps(dict(identity))
                        (staging / _IDENTITY).write_text(text, encoding="utf-8")
                old = target.exists() and any(_is_weights(path.name) for path in target.iterdir())
                yield Staging(staging, output, () if restart else changed or (), old)
                _put(output, target)
            except BaseException as error:
                if identity is None or not is_resumable(error):
                    _clear(staging)
                raise
            _clear(staging)
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def new_folder(place: StrPath, subject: str, where: str | None = None) -> Iterator[Path]:
    """Yield a folder to fill: it is at `place` afterwards, or nothing is there after an error.

    Messages call what is written `subject`, and the place `where`, or by its path.
    """
    where, place = where or str(place), os.path.expanduser(place)
    require([*place_problems(place, where, empty=True)], subject)
    try:
        with staged(place) as staging:
            yield staging.output
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        found = f"an error while writing ({error.strerror or error}{named})"
        expected = "space on the disk and the right to write"
        raise ConfigError([Problem(where, found, expected)], subject) from error


def place_problems(
    out_path: StrPath,
    where: str,
    inputs: Iterable[StrPath] = (),
    *,
    empty: bool = False,
    without: Collection[str] = KINDS,
    needed: int = 0,
) -> Iterator[Problem]:
    """Yield what keeps an output from being written, which messages call `where`.

    Of `inputs` names that are no files are passed over; an `empty` folder may be missing, and one
    `without` some files, which would stay; `needed` are the bytes beside what the output replaces.
    What an earlier process has left counts as free.
    """
    try:
        if empty and str(out_path).startswith("~"):  # which callers have expanded
            raise ValueError("no such user")
        target = Path(out_path).resolve()
        if target.exists() and not target.is_dir():
            yield Problem(where, f"{target}, which is a file", "a folder", _CHOOSE)
            return
        existing = next(folder for folder in (target, *target.parents) if folder.exists())
        # Permissions are not enough: no process can make a folder in /proc.
        with tempfile.TemporaryDirectory(prefix=".", suffix=_SUFFIX, dir=existing) as probe:
            (Path(probe) / target.relative_to(existing)).mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(existing)
        left = _left(_directory(target))
        names = [path.name for path in target.iterdir()] if target.exists() else []
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; no name of a file
        reason = getattr(error, "strerror", None) or error
        yield Problem(where, f"{out_path}, which cannot be made ({reason})", "a writable folder")
        return
    if empty and not all(n.startswith(".") and n.endswith(_SUFFIX) for n in names):
        found = f"{target}, which is not empty"
        expected = "a folder that does not exist or is empty"
        yield Problem(where, found, expected, _CHOOSE)
    elif held := [name for name in without if name in names]:
        found = f"{target}, which holds another output ({held[0]})"
        yield Problem(where, found, "a folder for this one", _CHOOSE)
    # Some file systems do not know their size: they have no bytes at all.
    if disk.total and needed > disk.free + left:
        found = f"{existing}, which has {disk.free + left:,} bytes left"
        remedy = "Free some space, or choose a place on another disk."
        yield Problem(where, found, f"{needed:,} bytes for the output", remedy)
    for name in inputs:
        with suppress(OSError, RuntimeError, ValueError):  # no file's name: other checks report it
            source = Path(name).resolve()
            inside = source.parent == target and _is_weights(source.name)
            if not (source == target or inside) or not source.exists():
                continue
            found = f"{target}, where the input {name} lies, which the output would replace"
            yield Problem(where, found, "a folder that no input lies in", _CHOOSE)


def is_resumable(error: BaseException) -> bool:
    """Return whether `error` came from the machine or the user: an input's would come again."""
    if isinstance(error, MergekitExtError):
        return bool(getattr(error, "resumable", False))
    return by_machine(error) or not isinstance(error, Exception)


def by_machine(error: BaseException) -> bool:
    """Return whether an error of a library is about the machine: disk, files, memory, device."""
    if isinstance(error, (OSError, MemoryError, SafetensorError)):
        return True
    named = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")  # torch's
    return isinstance(error, RuntimeError) and (
        named or (type(error) is RuntimeError and bool(_NO_MEMORY.search(str(error))))
    )


def flush(folder: Path) -> None:
    """Wait until all files below `folder`, and the folders that name them, are on the disk."""
    # Otherwise a file may have its length and hold zeros after a power cut.
    for place, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(place, name) for name in names), Path(place)):
            if not path.is_symlink():
                _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def _directory(target: Path) -> Path:
    """Return the path of the staging directory: beside `target`, and on its file system.

    Inside if that is a mount point or its parent is not writable. The name has that of the machine,
    because other machines may not see its locks.
    """
    mounted = target.exists() and (
        os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK)
    )
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    # Names end at 255 bytes on most file systems; the output's may be as long as that.
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    name = f".{target.name[:40]}-{host[:40]}-{digest}{_SUFFIX}"
    return (target if mounted else target.parent) / name


def _left(staging: Path) -> int:
    """Return the bytes on the disk of what an earlier process of this user has left."""
    found = 0
    with suppress(OSError):  # another process may be removing it
        state = staging.lstat()
        if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid():
            for place, _, names in os.walk(staging):
                found += sum(Path(place, name).lstat().st_blocks for name in names) * 512
    return found


@contextmanager
def _locked(staging: Path, target: Path) -> Iterator[None]:
    """Hold the lock of a staging directory, which is made if missing and removed if left empty."""
    try:
        with suppress(FileExistsError):
            staging.mkdir(mode=0o700)
        _require_own(staging, target)
        lock = _acquired(staging)
    except (Timeout, FileNotFoundError):  # the second: another process has just removed it
        raise _occupied(target, f"another process that is writing it, in {staging}") from None
    try:
        yield
    finally:
        # Removed while it is locked: no other process takes a lock that has no name any more.
        with suppress(OSError):
            if {path.name for path in staging.iterdir()} <= {_LOCK, _MARKER}:
                (staging / _LOCK).unlink(missing_ok=True)
                (staging / _MARKER).unlink(missing_ok=True)
                staging.rmdir()
        lock.release()


def _require_own(staging: Path, target: Path) -> None:
    """Refuse what is no staging directory that a process of this user has left."""
    state = staging.lstat()
    # Some file systems give all files one owner, of any process.
    with tempfile.TemporaryFile(dir=staging.parent) as probe:
        owner = os.fstat(probe.fileno()).st_uid
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != owner:
        raise _occupied(target, f"{staging}, which is no folder of this user")
    names = {path.name for path in staging.iterdir()}
    if names and not names & {_LOCK, _MARKER, _IDENTITY}:
        raise _occupied(target, f"{staging}, which is no staging directory")


def _acquired(staging: Path) -> BaseFileLock:
    try:
        lock: BaseFileLock = FileLock(staging / _LOCK, blocking=False)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(staging / _MARKER, blocking=False)
        lock.acquire()
    return lock


def _occupied(target: Path, found: str) -> ConfigError:
    remedy = "Wait for that process or stop it, remove the folder, or choose another name."
    problem = Problem(str(target), found, "a place that nothing else writes to", remedy)
    return ConfigError([problem])


def _differences(staging: Path, identity: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the parts of the identity that differ; None if none can be read."""
    found, wrong = json_object(staging / _IDENTITY, "", _LARGEST_IDENTITY)
    if wrong is not None:
        return None
    return tuple(key for key in {**identity, **found} if found.get(key) != identity.get(key))


def _clear(staging: Path) -> None:
    """Remove all but the lock, the identity first: what a kill leaves is never continued."""
    with suppress(OSError):
        for path in sorted(staging.iterdir(), key=lambda path: path.name != _IDENTITY):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in (_LOCK, _MARKER):
                path.unlink(missing_ok=True)


def open_as_others(*files: Path) -> None:
    """Give files the access that new ones have: safetensors' are private, copies have another's."""
    os.umask(mask := os.umask(0o077))
    for path in files:
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def _put(written: Path, target: Path) -> None:
    open_as_others(*written.rglob("*"))
    flush(written)
    if not target.exists():
        written.rename(target)
        _flush_one(target.parent)
        return
    if not any(target.iterdir()):
        with suppress(OSError):  # a mount point keeps its place
            written.rename(target)
            _flush_one(target.parent)
            return
    old = [path for path in target.iterdir() if _is_weights(path.name)]
    # The index first: without it the shards of two models cannot be taken for one.
    for path in sorted(old, key=lambda path: not _INDEX.fullmatch(path.name)):
        path.unlink()
    for path in sorted(written.iterdir(), key=_turn):
        destination = target / path.name
        if destination.is_dir():
            destination.unlink() if destination.is_symlink() else shutil.rmtree(destination)
        shutil.move(path, destination)  # which copies where the target is mounted
        flush(destination) if destination.is_dir() else _flush_one(destination)
    _flush_one(target)


def _turn(path: Path) -> int:
    # What makes a folder a model comes when the rest is there.
    if path.name in KINDS or _INDEX.fullmatch(path.name):
        return 2
    return bool(WEIGHTS.fullmatch(path.name))


def _is_weights(name: str) -> bool:
    return bool(WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name))
