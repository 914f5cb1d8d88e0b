"""A program that loads the libraries once, and forks two processes for each of two tasks.

Argument: a folder with ``<name>.yml`` for each of some merges, where ``<name>/out`` comes. First
all but ``killed`` are merged, one after another; ``<name>.<rank>.count`` has how many pieces each
process has made. Then ``killed`` is; its second process is killed at the third tensor.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.events import JsonLines
from mergekit_ext.host import session
from mergekit_ext.host.run import merge
from mergekit_ext.host.tasks import MergeTensorTask
from mergekit_ext.io.journal import Journal
from mergekit_ext.parallel import current, launched
from tests.processes.launching import forked

FOLDER = Path(sys.argv[1])
KILLED = FOLDER / "killed.yml"
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)


def all_merges():
    kinds, add = [], Journal.add
    Journal.add = lambda journal, kind, *rest: (kinds.append(kind), add(journal, kind, *rest))
    with launched() as us:
        if not us.is_main:  # whose folder is gone when the main process is done
            del session.agree
        for config in sorted({*FOLDER.glob("*.yml")} - {KILLED}):
            kinds.clear()
            events = [JsonLines(config.with_suffix(".jsonl"))] if us.is_main else []
            merge(config, FOLDER / config.stem / "out", OPTIONS, callbacks=events)
            made = sum(kind in ("tensor", "piece") for kind in kinds)
            config.with_suffix(f".{us.rank}.count").write_text(str(made))


def one_killed():
    merges, begun = MergeTensorTask.execute, []

    def execute(self, *arguments, **named):
        begun.append(self)
        if len(begun) == 3 and current().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return merges(self, *arguments, **named)

    MergeTensorTask.execute = execute
    with launched():
        merge(KILLED, FOLDER / "killed" / "out", OPTIONS)


if __name__ == "__main__":
    mergekit_ext.register()
    assert forked(all_merges) == [0, 0]
    assert forked(one_killed) == [1, -signal.SIGKILL]
