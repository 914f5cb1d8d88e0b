"""Several processes of one command, with torchrun or by hand."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PYTHONFAULTHANDLER": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def torchrun(*command, **variables):
    """Run two processes of a program to their end."""
    return subprocess.run(
        [*TORCHRUN, *map(str, command)],
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def by_hand(*command, **variables):
    """Start two processes of a program without a launcher that looks after them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **variables,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
