"""Merges that are killed at random moments, and gone on with: what is left, and what is lost.

    python -m bench.kills --kills 50
    python -m bench.kills --kills 4 --processes 2     # torchrun, of which one process is killed

Each round kills the merge (SIGKILL) at a moment that is uniform over the time of an undisturbed
one, every third time twice in a row, and then runs it to its end. A kill is survived if nothing
that loads, but is neither the old nor the new output, lies at the output's place after it, and if
the end has the files of the undisturbed merge, bit for bit. Every second round of `nan_ties` and
`lore` merges into a folder with an earlier model.

The merges are children of one process that has loaded the libraries, so that the moments fall into
merging and not into starting; several processes are started as a user does. The exit code is 1 if
a kill was not survived.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import machine
from bench.killed import cases, children, launched
from bench.killed.cases import Case
from bench.killed.counting import counted
from bench.killed.places import Digests, digests, expected, state

_TWICE = 1 / 3
_TRIES = 10  # of a merge that ended before its kill
End = tuple[bool, float]
"""Whether a run came to its end, and the seconds that it took."""


@dataclass
class Tally:
    """Figures of one method. Pieces are lines of the journal: tensors, norms, blocks."""

    rounds: int = 0
    kills: int = 0
    survived: int = 0
    went_on: int = 0
    pieces: int = 0
    kept: int = 0

    def __str__(self) -> str:
        share = f"{self.kept / self.pieces:.0%}" if self.pieces else "none"
        return (
            f"{self.survived} of {self.kills} kills in {self.rounds} rounds survived; "
            f"{self.went_on} rounds had something to go on with; work not done again: {share}"
        )


class Study:
    """Kills of one case.

    Args:
        case: what is merged.
        folder: for its outputs.
        run: merges into a folder, and is killed after so many seconds if they are given.

    Attributes:
        seconds: of an undisturbed run, the shortest so far.
    """

    def __init__(
        self,
        case: Case,
        folder: Path,
        run: Callable[[Path, float | None], End],
    ):
        self._case, self._folder, self._run = case, folder, run
        self.tally = Tally()
        first = folder / "undisturbed" / "out"
        self.seconds = run(first, None)[1]
        self._all = counted(folder)
        self._whole = digests(first)

    def round(self, chance: random.Random, over: Path | None) -> str:
        """Kill, go on, compare; what happened, for people to read."""
        out = self._folder / f"round{self.tally.rounds}" / "out"
        old: Digests = {}
        if over is not None:
            shutil.copytree(over, out)
            old = digests(out)
        wanted = expected(old, self._whole)
        moments, wrong = self._kill(chance, out, old, wanted)
        ended = state(out, old, wanted) == "new"
        if not ended:
            counted(self._folder)
            ended = self._run(out, None)[0]
        again = counted(self._folder)
        found = digests(out) if out.exists() else {}
        if not ended:
            wrong.append("did not end")
        if found != wanted:
            differ = {n for n in {**wanted, **found} if wanted.get(n) != found.get(n)}
            wrong.append(f"other files at the end: {', '.join(sorted(differ)[:5])}")
        if left := [path.name for path in (*out.parent.iterdir(), *out.iterdir()) if _hidden(path)]:
            wrong.append(f"left: {left}")
        tally = self.tally
        tally.rounds += 1
        tally.kills += len(moments)
        tally.survived += 0 if wrong else len(moments)
        tally.pieces += self._all
        tally.kept += self._all - again
        tally.went_on += again < self._all
        if not wrong:
            shutil.rmtree(out.parent)
        killed = ", ".join(f"{100 * m / self.seconds:.0f}%" for m in moments)
        return f"killed at {killed}, made again {again} of {self._all}: {wrong or 'survived'}"

    def _kill(
        self, chance: random.Random, out: Path, old: Digests, wanted: Digests
    ) -> tuple[list[float], list[str]]:
        moments: list[float] = []
        wrong: list[str] = []
        for _ in range(2 if chance.random() < _TWICE else 1):
            for _ in range(_TRIES):
                moment = chance.uniform(0, self.seconds)
                counted(self._folder)
                ended, seconds = self._run(out, moment)
                if ended:  # the machine had more to do when it was timed
                    self.seconds = min(self.seconds, seconds)
                found = state(out, old, wanted)
                if found != "new":
                    break
                if moments:  # the second of two came too late: the merge is done
                    return moments, wrong
                self._renew(out, old)
            else:
                raise SystemExit(f"{self._case.name}: every run ends before it is killed")
            moments.append(moment)
            if found == "wrong":
                wrong.append(f"what loads after a kill at {moment:.2f} s is a mixture or a part")
        return moments, wrong

    def _renew(self, out: Path, old: Digests) -> None:
        if not old:
            shutil.rmtree(out.parent)
            return
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._case.earlier, out, dirs_exist_ok=True)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def study(
    case: Case, folder: Path, kills: int, chance: random.Random, processes: int
) -> tuple[Tally, float]:
    """Kill one case so many times."""
    folder.mkdir()
    runner = launched.Runner(case, folder, processes, chance) if processes > 1 else None
    run = runner.run if runner else children.Runner(case, folder).run
    found = Study(case, folder, run)
    while found.tally.kills < kills:
        over = case.earlier if case.replaces and found.tally.rounds % 2 else None
        print(f"  {case.name}, round {found.tally.rounds}: {found.round(chance, over)}", flush=True)
    return found.tally, found.seconds


def main() -> int:
    """Kill every method in turn; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of all methods together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="that share each merge")
    parser.add_argument("--methods", nargs="+", choices=cases.NAMES, default=cases.NAMES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # children that are forked have no threads but their own
    print(machine.describe())
    chance = random.Random(arguments.seed)
    started = time.monotonic()
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        made = cases.make(Path(name), arguments.methods)
        if arguments.processes > 1:
            made = [case for case in made if case.shared_out]
        for index, case in enumerate(made):
            share = arguments.kills // len(made) + (index < arguments.kills % len(made))
            tally, seconds = study(case, Path(name) / case.name, share, chance, arguments.processes)
            print(f"{case.name} ({seconds:.1f} s undisturbed): {tally}", flush=True)
            lost += tally.kills - tally.survived
    print(f"seed {arguments.seed}, {time.monotonic() - started:.0f} s; not survived: {lost}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
