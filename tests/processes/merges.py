"""A program that loads the libraries once, and forks two processes for each of two tasks.

Argument: a folder with ``<name>.yml`` for each of some merges, where ``<name>/out`` comes. First
all but ``killed`` are merged, one after another; ``<name>.<rank>.count`` has how many pieces each
process has made. Then ``killed`` is; its second process is killed at the third tensor.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.events import JsonLines
from mergekit_ext.host.run import merge
from mergekit_ext.host.tasks import MergeTensorTask
from mergekit_ext.io.pieces import Journal
from mergekit_ext.parallel import launched

FOLDER = Path(sys.argv[1])
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)


def forked(work):
    """How two processes end that do the same work."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in values.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            try:
                with launched() as us:
                    work(us)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def all_merges(us):
    kinds, add = [], Journal.add
    Journal.add = lambda journal, kind, *rest: (kinds.append(kind), add(journal, kind, *rest))
    for config in sorted(FOLDER.glob("*.yml")):
        if config.stem != "killed":
            kinds.clear()
            events = [JsonLines(config.with_suffix(".jsonl"))] if us.is_main else []
            merge(config, FOLDER / config.stem / "out", OPTIONS, callbacks=events)
            made = sum(kind in ("tensor", "block") for kind in kinds)
            config.with_suffix(f".{us.rank}.count").write_text(str(made))


def one_killed(us):
    merges, begun = MergeTensorTask.execute, []

    def execute(self, *arguments, **named):
        begun.append(self)
        if len(begun) == 3 and us.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return merges(self, *arguments, **named)

    MergeTensorTask.execute = execute
    merge(FOLDER / "killed.yml", FOLDER / "killed" / "out", OPTIONS)


if __name__ == "__main__":
    mergekit_ext.register()
    assert forked(all_merges) == [0, 0]
    assert forked(one_killed) == [1, -signal.SIGKILL]
