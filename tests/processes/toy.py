"""A program of two processes that meet: both end well, or one is killed."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from functools import partial

import torch
from torch.distributed import group

from mergekit_ext.parallel import current, launched
from tests.processes.launching import forked


def talk(victim=None):
    with launched() as us:
        assert current() is us and us.size == 2
        # One may merge for days while the other waits.
        gloo = group.WORLD._get_backend(torch.device("cpu"))
        assert gloo.options._timeout > timedelta(days=30)
        for turn in range(50):
            assert us.gather((turn, us.rank)) == [(turn, 0), (turn, 1)]
            assert us.from_main(lambda turn=turn: turn * turn) == turn * turn
        assert us.gather(b"x" * (9 << 20)) == [b"x" * (9 << 20)] * 2
        if victim == us.rank:
            os.kill(os.getpid(), signal.SIGKILL)
    assert current().size == 1


if __name__ == "__main__":
    assert forked(talk) == [0, 0]
    assert forked(partial(talk, 0)) == [-signal.SIGKILL, 1]
    assert forked(partial(talk, 1)) == [1, -signal.SIGKILL]
