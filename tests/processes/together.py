"""Threads of one process that see each other as the processes of a merge."""

from __future__ import annotations

import threading

import torch.distributed as distributed

from mergekit_ext.processes import Processes


def together(work, size=2):
    """Run `work` with the ranks of each of `size` threads; what each returned or raised."""
    store = distributed.HashStore()
    found = [None] * size

    def run(rank):
        ranks = Processes(store, rank, size)
        ranks.open()
        try:
            found[rank] = work(ranks)
        except BaseException as error:
            found[rank] = error
            ranks.close(error)
        else:
            ranks.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found
