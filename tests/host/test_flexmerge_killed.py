"""A FlexMerge that is killed at any moment goes on, and ends as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import yaml

# One process loads the libraries; each merge is a child of it, which it kills.
KILLER = """
import json, os, random, signal, sys, time
import torch, yaml
torch.set_num_threads(1)
import mergekit_ext
from mergekit.options import MergeOptions
from mergekit_ext.events import MergeCallback
import mergekit_ext.host.flexmerge.engine
from mergekit_ext.host.run import merge
import transformers.models.llama, mergekit.card
mergekit_ext.register()

class Slow(MergeCallback):
    def on_tensor_measured(self, event):
        time.sleep(0.005)
    def on_block_merged(self, event):
        time.sleep(0.005)

def child(source, out, seconds=None):
    started = time.monotonic()
    number = os.fork()
    if number == 0:
        try:
            merge(source, out, MergeOptions(quiet=True), callbacks=[Slow()])
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0 or (seconds is not None and code == -signal.SIGKILL), code
    return time.monotonic() - started, code

sources, scratch, kills = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
random.seed(sys.argv[4])
killed = 0
for name, source in sources.items():
    whole, out = f"{scratch}/{name}/whole/out", f"{scratch}/{name}/killed/out"
    seconds, _ = child(source, whole)
    done = 0
    for _ in range(kills):
        _, code = child(source, out, random.uniform(0.1, 0.6) * seconds)
        killed += code != 0
        if code == 0:
            break
        assert not os.path.exists(out), "a killed merge left an output"
    else:
        child(source, out)
print(killed)
"""


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_at_random_moments(families, tmp_path):
    family = families("llama")
    contents = {
        "ties": family.content(1.7, "ties", similarity_on="trimmed"),
        "emr": family.content(2.4, "emr", dare_density=0.5),
        "stock": family.content(1.4, "della", order="random", density=0.5, weight=1.0),
    }
    sources = json.dumps({name: yaml.safe_dump(content) for name, content in contents.items()})
    seed = str(int.from_bytes(os.urandom(4), "big"))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, sources, tmp_path, "2", seed],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (seed, done.stderr[-9000:])
    assert int(done.stdout) >= 2, "too few merges were killed on the way"
    for name in contents:
        whole, killed = (tmp_path / name / which for which in ("whole", "killed"))
        assert files(killed / "out") == files(whole / "out"), (name, seed)
        assert [path.name for path in killed.iterdir()] == ["out"]
