"""The last snapshots of a training, folders by step, and a merge of them."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_ext.callbacks.settings import INITIAL, SUBJECT, State
from mergekit_ext.errors import MergeWarning, Problem, require, warn
from mergekit_ext.io.hub import Pushable
from mergekit_ext.io.staging import new_folder, place_problems

_OWN = re.compile(rf"step-[0-9]{{8}}|{INITIAL}")


class Snapshots:
    """At most `keep` folders; the oldest goes before a new one is made.

    A run's `own` snapshots are `step-<8 digits>` and `initial` in its folder; nothing else is ever
    removed, whatever a state names. Checkpoints that a trainer saved are only forgotten.
    """

    def __init__(self, keep: int, folder: Path, own: bool):
        self._keep, self._own, self.folder = keep, own, folder
        self._kept: dict[int, Path] = {}
        self.initial = folder / INITIAL
        self.has_initial = False

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self._kept))

    def open(self) -> None:
        """Make the folder; refuse one that another run has used or that cannot be written."""
        ours = {*self._kept.values(), *([self.initial] if self.has_initial else [])}
        where = f"where: {self.folder}"
        problems = [*place_problems(self.folder, where, without=())]
        if left := [place.name for place in self._found() if place not in ours]:
            text = f"{len(left)} snapshots of another run, such as {left[0]}"
            remedy = "Choose another folder, delete them, or load the state of that run."
            problems.append(Problem(where, text, "a folder for this run", remedy))
        require(problems, SUBJECT)
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, save: Callable[[Path], object]) -> None:
        """Keep a snapshot, which `save` writes into the empty folder that it is called with."""
        self._make_way(step)
        place = self._place(step)
        with new_folder(place, f"the snapshot of step {step}") as folder:
            save(folder)
        self._kept[step] = place

    def add_saved(self, step: int, folder: Path) -> None:
        """Keep a checkpoint that a trainer saved."""
        self._make_way(step)
        self.folders()
        self._kept[step] = folder

    def folders(self) -> dict[int, Path]:
        """Return the snapshots, oldest first; refuse if some were removed."""
        remedy = "Keep as many checkpoints as are merged (`save_total_limit` of a Trainer)."
        gone = [place for place in self._kept.values() if not os.path.isdir(place)]
        require((Problem(str(p), "no such folder", "a snapshot", remedy) for p in gone), SUBJECT)
        return dict(sorted(self._kept.items()))

    def clear(self) -> None:
        """Forget all snapshots and the initial weights."""
        for step in self.steps:
            self._forget(step)
        if self.has_initial:
            shutil.rmtree(self.initial, ignore_errors=True)
        self.has_initial = False

    def load(self, state: State) -> None:
        """Take over the snapshots of an earlier run; those made after its state was saved go."""
        ours = Path(state.folder) == self.folder
        paths = state.snapshots.items()
        named = {step: self._place(step) if self._own else Path(path) for step, path in paths}
        usable = named if ours or not self._own else {}
        self._kept = {step: place for step, place in usable.items() if os.path.isdir(place)}
        self.has_initial = state.initial and ours and os.path.isdir(self.initial)
        if gone := len(named) - len(self._kept):
            text = (
                f"{gone} of {len(named)} snapshots are gone since the state was saved; later "
                "merges are made of the others. Give `where` the folder of the run that is resumed."
            )
            warn(MergeWarning(text))
        if self._own and ours:
            newest = self._place(max(named, default=0)).name  # `initial` comes before all
            for place in self._found():
                if place.name > newest and not place.is_symlink():
                    shutil.rmtree(place)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _make_way(self, step: int) -> None:
        self._forget(step)  # a resumed run does a step again
        while len(self._kept) >= self._keep:
            self._forget(min(self._kept))

    def _forget(self, step: int) -> None:
        if (place := self._kept.pop(step, None)) is not None and self._own:
            shutil.rmtree(place, ignore_errors=True)

    def _found(self) -> list[Path]:
        places = sorted(self.folder.glob("*"), reverse=True)
        return [place for place in places if _OWN.fullmatch(place.name) and place.is_dir()]


@dataclass(frozen=True)
class Merged(Pushable):
    """A merge of snapshots.

    Attributes:
        path: the folder of the merged model or adapter, an ordinary one, with its report.
        steps: of the snapshots that were merged; for `average` and `ema` of all that went in.
        method: of `MergeCheckpoints`.
        scores: of the merged weights, if they were evaluated.
        before: of the model's own weights at that time.
        loaded: whether the merged weights were put into the model.
    """

    path: Path
    steps: tuple[int, ...]
    method: str
    scores: Mapping[str, float] | None = None
    before: Mapping[str, float] | None = None
    loaded: bool = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the merged folder to `path`, where it appears when it is complete.

        Raises:
            ConfigError: there is something at `path` already.
        """
        with new_folder(path, "this copy") as folder:
            shutil.copytree(self.path, folder, dirs_exist_ok=True)
