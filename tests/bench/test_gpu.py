"""The script for a GPU runs in its small form: every section, one that fails, one without end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench import gpu

ROOT = Path(__file__).parents[2]


def small(*options: str, before: str = "") -> tuple[str, list[gpu.Row]]:
    """What the small form prints, and its rows."""
    # A process of its own: its sections are forks, which locks of this one's threads would stop.
    code = f"{before}\nfrom bench import gpu; gpu.main()"
    command = [sys.executable, "-c", code, "--small", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return output, [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_the_small_form():
    output, rows = small()
    found = {name: [r for r in rows if r["section"] == name] for name in gpu.SECTIONS | gpu.TRIALS}
    problems = {row["section"]: row["problem"] for row in rows if "problem" in row}
    assert problems == {"failing": "ValueError: as it should", "endless": "deadline of 0.5 s"}
    assert [row["name"] for row in found["failing"]] == ["before", "failed"]
    assert all(found.values())
    assert all(row["error"] < 1e-4 for row in found["methods"] + found["serving"])
    assert all(row["same"] for row in found["bytes"])
    assert sum("against" in row["name"] for row in found["lore"]) == len(gpu.SPECTRA)
    assert "| endless | stopped | problem deadline of 0.5 s |" in output


def test_without_mergekit_the_sections_run_that_do_without():
    blocked = "import sys; sys.modules['mergekit'] = None"
    output, rows = small("--sections", "methods", "serving", before=blocked)
    assert [row["section"] for row in rows if "problem" in row] == ["methods"]
    assert sum("ratio" in row for row in rows) == 2
    assert "| serving | tiny, " in output
