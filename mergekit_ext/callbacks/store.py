"""Where the last snapshots are kept: in memory, in a folder, or where the trainer saved them."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.settings import SUBJECT
from mergekit_ext.callbacks.state import Saved
from mergekit_ext.callbacks.weights import Weights, copied, read, write
from mergekit_ext.errors import ConfigError, MergeWarning, Problem, printable
from mergekit_ext.io.paths import is_folder


class Store(ABC):
    """At most `keep` snapshots by step. The oldest goes before a new one is made."""

    def __init__(self, keep: int):
        self._keep = keep
        self._kept: dict[int, Any] = {}

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the snapshots, oldest first."""
        return tuple(self._kept)

    def add(self, step: int, weights: Weights) -> None:
        """Keep a snapshot of `weights`, which may be those of a live model."""
        if step in self._kept:  # a resumed run does a step again
            self._forget(step)
        while len(self._kept) >= self._keep:
            self._forget(min(self._kept))
        self._require_kept()
        self._kept[step] = self._made(step, weights)

    def snapshots(self, last: int | None = None) -> dict[int, Weights]:
        """Up to step `last`, oldest first."""
        self._require_kept()
        return {
            step: self._opened(kept)
            for step, kept in sorted(self._kept.items())
            if last is None or step <= last
        }

    def open(self) -> None:  # noqa: B027 (memory is there)
        """Refuse a place where snapshots cannot be kept."""

    def clear(self) -> None:
        """Forget all snapshots."""
        for step in self.steps:
            self._forget(step)

    def _forget(self, step: int) -> None:
        self._drop(step, self._kept.pop(step))

    @abstractmethod
    def _made(self, step: int, weights: Weights) -> Any: ...

    @abstractmethod
    def _opened(self, kept: Any) -> Weights: ...

    def _require_kept(self) -> None:  # noqa: B027 (what is in memory stays)
        """Refuse to go on when somebody else has removed snapshots."""

    def _drop(self, step: int, kept: Any) -> None:  # noqa: B027 (forgetting is enough, unless there are files)
        """Remove what a snapshot left outside of this object."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """For `load`, in another process."""

    @abstractmethod
    def load(self, state: Saved) -> None:
        """Take over the snapshots of an earlier run.

        Raises:
            ConfigError: it is no state of such a store; nothing was taken over.
        """


class MemoryStore(Store):
    """Copies on the CPU."""

    def _made(self, step: int, weights: Weights) -> Weights:
        return copied(weights)

    def _opened(self, kept: Weights) -> Weights:
        return kept

    def state(self) -> dict[str, Any]:
        """The tensors themselves."""
        return {str(step): packed(weights) for step, weights in self._kept.items()}

    def load(self, state: Saved) -> None:
        """See `Store.load`."""
        self._kept = {step: unpacked(value) for step, value in state.by_step().items()}


class SavedStore(Store):
    """The folders that the trainer saved; they stay when they are forgotten."""

    def _made(self, step: int, weights: Weights) -> str:
        return str(weights.folder)

    def _opened(self, kept: str) -> Weights:
        return read(kept)

    def _require_kept(self) -> None:
        gone = [path for path in self._kept.values() if not is_folder(path)]
        remedy = "Keep as many checkpoints as are merged (`save_total_limit` of a Trainer)."
        if gone:
            raise ConfigError(
                [Problem(path, "no such folder", "a snapshot", remedy) for path in gone], SUBJECT
            )

    def state(self) -> dict[str, Any]:
        """The paths."""
        return {str(step): path for step, path in self._kept.items()}

    def load(self, state: Saved) -> None:
        """Take over those paths that still exist."""
        paths = {step: path.text() for step, path in state.by_step().items()}
        self._kept = {step: path for step, path in paths.items() if is_folder(path)}
        if gone := [path for step, path in paths.items() if step not in self._kept]:
            warnings.warn(
                MergeWarning(
                    f"{len(gone)} of {len(paths)} snapshots are gone since the state was saved: "
                    f"{printable(', '.join(gone))}. Later merges are made of the others."
                ),
                stacklevel=3,
            )


class FolderStore(SavedStore):
    """Folders ``step-<step>`` in a folder that belongs to one run.

    Nothing else is ever removed: a state may name the snapshots of another run, or anything.
    """

    def __init__(self, keep: int, folder: Path):
        super().__init__(keep)
        self._folder = folder

    def open(self) -> None:
        """Refuse a folder with snapshots of another run, or in which nothing can be written.

        Raises:
            ConfigError: it is one of them.
        """
        where = f"where: {self._folder}"
        if strange := [place for _, place in self._found() if place not in self._known()]:
            found = f"{len(strange)} snapshots of another run, such as {strange[0].name}"
            remedy = "Choose another folder, delete them, or load the state of that run."
            raise ConfigError([Problem(where, found, "a folder for this run", remedy)], SUBJECT)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder):
                pass
        except OSError as error:
            problem = Problem(where, str(error), "a folder that can be written")
            raise ConfigError([problem], SUBJECT) from None

    def _made(self, step: int, weights: Weights) -> str:
        place = self._place(step)
        shutil.rmtree(place, ignore_errors=True)
        write(weights, place)
        return str(place)

    def _drop(self, step: int, kept: str) -> None:
        if kept == str(self._place(step)):
            shutil.rmtree(kept, ignore_errors=True)

    def state(self) -> dict[str, Any]:
        """The paths, and whose they are."""
        return {"folder": str(self._folder.resolve()), "kept": super().state()}

    def load(self, state: Saved) -> None:
        """Take over snapshots; those made after the state was saved are deleted."""
        folder, kept = state["folder"].text(), state["kept"]
        super().load(kept)
        if folder != str(self._folder.resolve()):
            return  # what is here is another run's
        last = max(kept.by_step(), default=0)
        for step, place in self._found():
            if place not in self._known() and step > last and not place.is_symlink():
                shutil.rmtree(place)

    def _place(self, step: int) -> Path:
        return self._folder.resolve() / f"step-{step:08d}"

    def _known(self) -> set[Path]:
        return {Path(path).resolve() for path in self._kept.values()}

    def _found(self) -> Iterator[tuple[int, Path]]:
        for place in sorted(self._folder.resolve().glob("step-*")):
            digits = place.name.removeprefix("step-")
            # Those of other lengths, or of other digits than ours, are none of ours.
            if digits.isdecimal() and place == self._place(int(digits)) and place.is_dir():
                yield int(digits), place


def packed(weights: Weights) -> dict[str, Any]:
    """Weights as a state dictionary holds them."""
    config = None if weights.config is None else dict(weights.config)
    folder = None if weights.folder is None else str(weights.folder)
    return {"tensors": dict(weights.tensors), "config": config, "folder": folder}


def unpacked(state: Saved) -> Weights:
    """The weights in a state dictionary.

    Raises:
        ConfigError: there are none in it.
    """
    config, folder = state["config"], state["folder"]
    if config.value is not None:
        config.fields()
    place = None if folder.value is None else Path(folder.text())
    return Weights(state["tensors"].tensors(), config.value, place)
