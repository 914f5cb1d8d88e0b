"""An installed command, in a process of its own and with little memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.attacks.weights import ATTACKS
from tests.models import config, write_yaml

# Address space: torch and what it loads take some 5 GB of it, and little of that is memory.
_ADDRESSES = 12 << 30


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of addresses")
def test_a_header_of_a_petabyte_takes_no_memory(inputs: Path, tmp_path: Path) -> None:
    file = inputs / "adapter1" / "adapter_model.safetensors"
    file.write_bytes(ATTACKS["shape of 10^15 elements"](file.read_bytes()))
    where = write_yaml(
        tmp_path / "m.yml", config("linear", [inputs / "adapter0", inputs / "adapter1"])
    )
    script = Path(sysconfig.get_path("scripts")) / "peft-merge"
    done = subprocess.run(
        [sys.executable, str(script), str(where), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES)),
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 2 and "no safetensors file" in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()
