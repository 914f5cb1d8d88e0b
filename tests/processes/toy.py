"""A program for two processes that meet; the one that the variable VICTIM names kills itself."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
from torch.distributed import group

from mergekit_ext.parallel import current, launched

if __name__ == "__main__":
    with launched() as us:
        assert current() is us and us.size == 2
        # One may merge for days while the other waits.
        gloo = group.WORLD._get_backend(torch.device("cpu"))
        assert gloo.options._timeout > timedelta(days=30)
        for turn in range(50):
            assert us.gather((turn, us.rank)) == [(turn, 0), (turn, 1)]
            assert us.from_main(lambda turn=turn: turn * turn) == turn * turn
        assert us.gather(b"x" * (9 << 20)) == [b"x" * (9 << 20)] * 2
        if os.environ.get("VICTIM") == str(us.rank):
            os.kill(os.getpid(), signal.SIGKILL)
    assert current().size == 1
