"""Ctrl-C at moments of a run of each command; a line of JSON for each.

``python -m tests.limits.stops FOLDER``
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.interrupted import run as interrupt
from bench.long_runs import cases, other_commands, peaks

# Of the time of an undisturbed run.
MOMENTS = (0.4,)


def run(folder: Path) -> None:
    """Interrupt everything, then measure runs of many small tensors."""
    torch.set_num_threads(1)
    stopped, long = folder / "stopped", folder / "long"
    stopped.mkdir()
    long.mkdir()
    commands = [*cases(stopped, 90, 4, 60), *other_commands(stopped, 1024)]
    for name, command in commands:
        log, place = folder / "log", stopped / name
        if name.startswith("lore"):
            ends = [interrupt(command, 1.0, log)]  # in the middle of one matrix
        else:
            seconds = interrupt(command, None, log).seconds
            place.rename(folder / f"{name} whole")
            ends = []
            for moment in MOMENTS:
                if not place.exists() or name == "sizes":  # which keeps what was scored
                    ends.append(interrupt(command, moment * seconds, log))
        line = {"name": name, "ends": [asdict(end) for end in ends], "whole": place.exists()}
        print(json.dumps(line), flush=True)
    for name, seen in peaks(long, 270, 10, 60):
        print(json.dumps({"name": name, **asdict(seen)}), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
