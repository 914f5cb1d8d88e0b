"""The place of an output: whether it can be written, and a folder that appears there when it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.io.durable import appear
from mergekit_ext.io.rooms import hidden_room


def place_problem(place: str | os.PathLike[str]) -> Problem | None:
    """What keeps an output from being written at `place`."""
    try:
        return _place_problem(Path(place).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user
        found = f"no place ({getattr(error, 'strerror', None) or error})"
        return Problem(str(place), found, "a folder's path", "Choose another place.")


def _place_problem(out: Path) -> Problem | None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        expected = "a folder that does not exist or is empty"
        return Problem(str(out), "something there already", expected, "Choose another place.")
    # The output is written beside its place first.
    parents = out.resolve().parents if out.exists() else out.absolute().parents
    above = next((folder for folder in parents if os.path.lexists(folder)), Path(os.sep))
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return None
    kind = "a folder without the right to write" if above.is_dir() else "a file, or a broken link"
    return Problem(str(out), f"{kind} above it, {above}", "a place that can be made")


def inside_problem(out: str | os.PathLike[str], source: object, where: str) -> Problem | None:
    """Whether an output would stand in the folder of one of the inputs."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        folder, target = (Path(path).expanduser().resolve() for path in (source, out))
        within = folder.is_dir() and target.is_relative_to(folder)
    except (OSError, RuntimeError, ValueError):  # no path: said elsewhere
        return None
    if not within:
        return None
    found = f"a place in the folder of {where}, {source}"
    return Problem(str(out), found, "a place outside of the inputs", "Choose another place.")


@contextmanager
def new_folder(place: str | os.PathLike[str], subject: str) -> Iterator[Path]:
    """Yield a folder to fill: it is at `place` afterwards, or nothing is there after an error.

    Args:
        place: a folder that does not exist or is empty.
        subject: what is written, for the messages.

    Raises:
        ConfigError: there is something at `place`, or it cannot be written.
    """
    if (problem := place_problem(place)) is not None:
        raise ConfigError([problem], subject)
    # A link to an empty folder stays a link.
    target = Path(os.path.realpath(Path(place).expanduser()))
    made: list[Path] = []
    try:
        _make(target.parent, made)
        with hidden_room(target, target.parent) as room:
            folder = room / "output"
            folder.mkdir()
            yield folder
            if target.exists():
                target.rmdir()
            appear(folder, target)
        made.clear()
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        found = f"an error while writing ({error.strerror or error}{named})"
        expected = "room and the right to write"
        raise ConfigError([Problem(str(place), found, expected)], subject) from error
    finally:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, and add those that are new to `made`."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir()
        except FileExistsError:  # by somebody else, just now
            continue
        made.append(each)
