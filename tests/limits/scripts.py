"""What a script of this folder tells, a JSON object a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_script(script: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Run one in a folder of its own: its lines, and its standard error."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.limits.{script}", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return lines, done.stderr
