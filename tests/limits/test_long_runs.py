"""Many tensors, models and adapters hold steady memory and few files; Ctrl-C ends each at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from mergekit_ext.core import memory
from tests.limits.scripts import run_script

# The promise is a second, which bench/robustness.py measures; here the machine may have other
# things to do. What is stopped would go on for half a minute.
AT_ONCE = 5.0


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What became of every command; all run in forks of one process."""
    lines, _ = run_script("stops", tmp_path_factory.mktemp("stops"))
    return lines


def test_interrupts_end_each_command_at_once(lines):
    found = [line for line in lines if "ends" in line]
    assert len(found) == 9
    stopped = 0
    for line in found:
        for end in line["ends"]:
            assert end["code"] in (0, 1), (line["name"], end)
            assert "Traceback" not in end["said"], (line["name"], end["said"])
            assert end["seconds"] < AT_ONCE, (line["name"], end["seconds"])
            stopped += end["code"]
            assert end["said"].rstrip().endswith("Aborted!") or not end["code"], end
        # One that was stopped leaves nothing at its place, but for the scores of a curve.
        ended = any(end["code"] == 0 for end in line["ends"])
        assert line["whole"] == ended or line["name"] == "sizes", line
    assert stopped >= 7


BUSY = {
    "one call": "torch.linalg.svd(torch.randn(4000, 4000))",
    "a thread": (
        "import time; from concurrent.futures import ThreadPoolExecutor; "
        "ThreadPoolExecutor().submit(time.sleep, 60); time.sleep(60)"
    ),
}


@pytest.mark.parametrize("busy", BUSY)
def test_nothing_that_a_library_does_delays_the_end(busy):
    code = f"""
import click, signal, torch
from mergekit_ext.core.commands import prompt
# What runs these tests may ignore Ctrl-C, as shells have it in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
@click.command()
def main():
    with prompt():
        print("begun", flush=True)
        {BUSY[busy]}
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    started = time.perf_counter()
    _, said = process.communicate(timeout=30)
    assert time.perf_counter() - started < AT_ONCE
    assert process.returncode == 1
    assert said.split() == ["Aborted!"]


@pytest.mark.skipif(not memory.held(), reason="the system does not tell what is held")
def test_long_runs_hold_steady_memory_and_few_files(lines):
    found = [line for line in lines if "files" in line]
    assert len(found) == 6
    for line in found:
        assert line["code"] == 0, line
        # Plans are made in the first third; the allocator keeps what fits a large block.
        assert line["most"] - line["third"] < 48 << 20, line
        assert line["files"] < 64, line
