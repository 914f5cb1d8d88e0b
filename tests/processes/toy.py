"""A program for two processes. Argument: what it does."""

from __future__ import annotations

import os
import signal
import sys

from mergekit_ext import processes, ranks
from mergekit_ext.errors import RankError
from mergekit_ext.launch import launched


def talk(us):
    for turn in range(50):
        assert us.gather((turn, us.rank)) == [(turn, rank) for rank in range(us.size)]
        assert us.from_main(lambda turn=turn: turn * turn) == turn * turn
    # More than torch's store takes at once.
    assert us.gather(b"x" * (9 << 20)) == [b"x" * (9 << 20)] * us.size
    if not us.is_main:
        for number in range(100):
            us.post((us.rank, number))
    us.wait()
    expected = [(1, number) for number in range(100)] if us.is_main else []
    found = us.received()
    assert found == expected, found


def die(us):
    processes._LAST_SIGN = 2.0
    us.wait()
    if us.rank == int(os.environ["VICTIM"]):
        os.kill(os.getpid(), signal.SIGKILL)
    us.gather(None)


def main():
    try:
        with launched() as us:
            assert ranks.current() is us and us.size == 2
            {"talk": talk, "die": die}[sys.argv[1]](us)
    except RankError as error:
        print(f"heard: {error}; resumable: {error.resumable}", file=sys.stderr)
        sys.exit(3)
    assert ranks.current().size == 1


if __name__ == "__main__":
    main()
