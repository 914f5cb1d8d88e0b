"""Merges that were stopped go on: nothing is made twice, and nothing shows that they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors import SafetensorError

import mergekit_ext
from mergekit_ext.errors import MergeError, StoppedError
from mergekit_ext.events import MergeCallback
from mergekit_ext.host import run
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.kernels.seeds import seeded
from tests import models as small

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no locks that end with a process")

SHARDED = MergeOptions(quiet=True, out_shard_size=20_000, copy_tokenizer=False)
TENSORS = 30


class Stop(MergeCallback):
    """Stops a merge at one of its events, and counts them."""

    def __init__(self, merged: int = 0, measured: int = 0, error: BaseException | None = None):
        self.stop_at = {"merged": merged, "measured": measured}
        self.error = error or KeyboardInterrupt()
        self.seen = {"merged": 0, "measured": 0}

    def _count(self, kind):
        self.seen[kind] += 1
        if self.seen[kind] == self.stop_at[kind]:
            raise self.error

    def on_tensor_merged(self, event):
        self._count("merged")

    def on_tensor_measured(self, event):
        self._count("measured")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("llama"), small.llama)


@pytest.fixture(scope="module")
def configs(llamas):
    base, tuned = llamas
    half = {"density": 0.5}
    contents = {
        "nan_ties": small.config("nan_ties", tuned, base, {"granularity": "model", **half}),
        "lore": small.config("lore", tuned, None, {"mu_relative": 0.2, "max_iterations": 3}),
        "nan_dare_ties": small.config("nan_dare_ties", tuned, base, half),
        "nan_della": small.config("nan_della", tuned, base, {**half, "epsilon": 0.2}),
    }
    return {name: yaml.safe_dump(content) for name, content in contents.items()}


@pytest.fixture(scope="module")
def undisturbed(configs, tmp_path_factory):
    """The bytes of each output that nothing has stopped, made when they are asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = merged(configs[name], tmp_path_factory.mktemp(name))[0]
        return made[name]

    return get


def merged(config, folder, *callbacks, options=SHARDED, **keywords):
    """Merge; return the output's bytes and the classes of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mergekit_ext.merge(config, folder / "out", options, callbacks=callbacks, **keywords)
    kinds = {warning.category.__name__ for warning in caught}
    (out,) = folder.iterdir()
    return contents(out), {kind for kind in kinds if kind.endswith("edWarning")}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stopped(config, folder, stop, error=KeyboardInterrupt, options=SHARDED):
    with warnings.catch_warnings(), pytest.raises(error):
        warnings.simplefilter("ignore")
        mergekit_ext.merge(config, folder / "out", options, callbacks=[stop])
    (staged,) = folder.iterdir()
    assert staged.name.startswith(".out-")
    return staged


@pytest.mark.parametrize("name", ["nan_ties", "lore"])
def test_an_interrupted_merge_goes_on(configs, undisturbed, tmp_path, name, capsys):
    stopped(configs[name], tmp_path, Stop(merged=12))
    assert "the same command goes on" in capsys.readouterr().err
    second = Stop(merged=7)
    stopped(configs[name], tmp_path, second)
    third = Stop()
    loud = SHARDED.model_copy(update={"quiet": False})
    found, _ = merged(configs[name], tmp_path, third, options=loud)
    assert found == undisturbed(name)
    assert second.seen["measured"] == third.seen["measured"] == 0
    # The last tensor before each stop was not written: its listener came first.
    assert third.seen["merged"] == TENSORS - 11 - 6
    assert f"Going on with a merge that was stopped: 17 of {TENSORS}" in capsys.readouterr().err


def test_warnings_are_those_of_an_undisturbed_merge(configs, tmp_path):
    """Only the first tensors do not converge."""
    stopped(configs["lore"], tmp_path, Stop(merged=TENSORS - 1))
    assert merged(configs["lore"], tmp_path)[1] == {"NotConvergedWarning"}


def test_norms_are_measured_again_unless_all_were(configs, undisturbed, tmp_path):
    stopped(configs["nan_ties"], tmp_path, Stop(measured=9))
    second = Stop()
    found, _ = merged(configs["nan_ties"], tmp_path, second)
    assert second.seen["measured"] == TENSORS
    assert found == undisturbed("nan_ties")


def test_what_is_not_as_the_journal_says_is_made_again(configs, undisturbed, tmp_path):
    staged = stopped(configs["nan_ties"], tmp_path, Stop(merged=12))
    journal = staged / "journal-1-0.lines"
    journal.write_bytes(journal.read_bytes()[:-5])
    shard = (
        staged / "out" / "model-00007-of-00007.safetensors"
    )  # which ends with the first that is merged
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (staged / "out" / "stray.safetensors").write_text("of no merge")
    second = Stop()
    found, _ = merged(configs["nan_ties"], tmp_path, second)
    assert second.seen["merged"] == TENSORS - 11 + 2
    assert found == undisturbed("nan_ties")


def test_another_merge_starts_over(configs, llamas, undisturbed, tmp_path, capsys):
    loud = SHARDED.model_copy(update={"quiet": False})
    stopped(configs["nan_dare_ties"], tmp_path, Stop(merged=12))
    second = Stop()
    found, _ = merged(configs["nan_ties"], tmp_path, second, options=loud)
    assert second.seen["merged"] == TENSORS
    assert "Starting over: not what was merged before (configuration)" in capsys.readouterr().err
    assert found == undisturbed("nan_ties")


@pytest.mark.parametrize("how", ["input", "option", "keyword", "environment"])
def test_what_makes_a_merge_start_over(configs, llamas, tmp_path, how, monkeypatch):
    stopped(configs["nan_ties"], tmp_path, Stop(merged=12))
    second, options, keywords = Stop(), SHARDED, {}
    if how == "input":
        weights = llamas[1][0] / "model.safetensors"
        found = weights.stat()
        os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    elif how == "option":
        options = SHARDED.model_copy(update={"random_seed": 1})
    elif how == "keyword":
        keywords = {"restart": True}
    else:
        monkeypatch.setenv("MERGEKIT_EXT_RESTART", "1")
    merged(configs["nan_ties"], tmp_path, second, options=options, **keywords)
    assert second.seen == {"merged": TENSORS, "measured": TENSORS}


def test_a_hidden_folder_that_went_away_is_not_promised(configs, tmp_path):
    class Removes(MergeCallback):
        def on_tensor_merged(self, event):
            shutil.rmtree(tmp_path / "above", ignore_errors=True)

    out = tmp_path / "above" / "out"
    with pytest.raises(StoppedError) as error:
        mergekit_ext.merge(configs["lore"], out, SHARDED, callbacks=[Removes()])
    assert "is kept" not in str(error.value)


def test_an_input_that_is_written_to_meanwhile_is_no_input(configs, llamas, tmp_path):
    weights = llamas[1][0] / "model.safetensors"
    found = weights.stat()

    class Writes(MergeCallback):
        def on_tensor_merged(self, event):
            os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns + 1))

    with pytest.raises(MergeError, match=r"tuned0.model\.safetensors: written to while"):
        mergekit_ext.merge(configs["lore"], tmp_path / "out", SHARDED, callbacks=[Writes()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 11])
def test_a_full_disk_loses_nothing(configs, undisturbed, tmp_path, monkeypatch, place):
    write, count = os.pwrite, []

    def full(*arguments):
        count.append(1)
        if len(count) > place:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    stopped(configs["lore"], tmp_path, Stop(), StoppedError)
    monkeypatch.setattr(os, "pwrite", write)
    second = Stop()
    assert merged(configs["lore"], tmp_path, second)[0] == undisturbed("lore")
    assert second.seen["merged"] == TENSORS - place


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
        RuntimeError("unable to mmap 8 bytes from file <a>: Cannot allocate memory (12)"),
        SafetensorError("Error while deserializing header: header too small"),
        MemoryError(),
    ],
    ids=["allocator", "map", "safetensors", "python"],
)
def test_what_libraries_say_of_the_machine_loses_nothing(configs, undisturbed, tmp_path, error):
    stopped(configs["lore"], tmp_path, Stop(merged=12, error=error), StoppedError)
    second = Stop()
    assert merged(configs["lore"], tmp_path, second)[0] == undisturbed("lore")
    assert second.seen["merged"] == TENSORS - 11  # the last was not written yet


def test_an_error_of_no_machine_leaves_nothing(configs, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        mergekit_ext.merge(
            configs["lore"],
            tmp_path / "out",
            SHARDED,
            callbacks=[Stop(merged=3, error=RuntimeError("shapes do not match"))],
        )
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_is_downloaded_again_meanwhile(configs, llamas, tmp_path):
    """Whatever a library says of half a file, the reason is that it was written to."""
    weights = llamas[1][0] / "model.safetensors"
    before = weights.read_bytes()

    class Begins(MergeCallback):
        def on_tensor_merged(self, event):
            weights.write_bytes(b"\0" * 100)
            raise SafetensorError("Error while deserializing header")

    try:
        with pytest.raises(MergeError, match=r"tuned0.model\.safetensors: written to while"):
            mergekit_ext.merge(configs["lore"], tmp_path / "out", SHARDED, callbacks=[Begins()])
    finally:
        weights.write_bytes(before)
    assert list(tmp_path.iterdir()) == []


# One process loads the libraries; each merge is a child of it.
KILLER = """
import json, os, random, resource, signal, sys, time
import torch, mergekit_ext
from mergekit.options import MergeOptions
from mergekit_ext.errors import MergekitExtError
from mergekit_ext.events import MergeCallback
from mergekit_ext.kernels import threads
mergekit_ext.register()
torch.set_num_threads(1)
OPTIONS = MergeOptions(quiet=True, out_shard_size=20_000, copy_tokenizer=False)

class Slow(MergeCallback):
    def on_tensor_measured(self, event):
        time.sleep(0.005)
    on_tensor_merged = on_tensor_measured

def begun(source, out, limit=None):
    child = os.fork()
    if child == 0:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            mergekit_ext.merge(source, out, OPTIONS, callbacks=[Slow()])
            os._exit(0)
        except MergekitExtError as error:
            os.write(1, str(error).encode())
            os._exit(2)
        finally:
            os._exit(1)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

random.seed(0)
for name, source in json.load(sys.stdin).items():
    mergekit_ext.merge(source, f"{name}-first/out", OPTIONS)  # which loads what is loaded late
    threads._pool.cache_clear()  # a child has no threads
    started = time.monotonic()
    assert ended(begun(source, f"{name}-whole/out")) == 0
    seconds = time.monotonic() - started
    for _ in range(3):
        child = begun(source, f"{name}-killed/out")
        time.sleep(random.uniform(0.2, 0.95) * seconds)
        os.kill(child, signal.SIGKILL)
        if ended(child) == 0:
            break
    else:
        assert ended(begun(source, f"{name}-killed/out")) == 0
    assert ended(begun(source, f"{name}-limited/out", limit=15_000)) == 2
    assert ended(begun(source, f"{name}-limited/out")) == 0
"""


def test_kills_and_limits_at_any_moment(configs, tmp_path):
    chosen = {name: configs[name] for name in ("nan_ties", "lore")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER],
        input=json.dumps(chosen),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large. What is finished is kept") == len(chosen)
    for name in chosen:
        whole = contents(tmp_path / f"{name}-whole" / "out")
        for kind in ("killed", "limited"):
            (out,) = (tmp_path / f"{name}-{kind}").iterdir()
            assert contents(out) == whole, (name, kind)


@pytest.mark.parametrize("name", ["nan_dare_ties", "nan_della"])
def test_threads_do_not_change_random_methods(name, request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    # Large enough for torch to split its sums.
    models = {f"{i}": {"w": (i + 1) * torch.randn(400, 300)} for i in range(3)}
    models["base"] = {"w": torch.ones(400, 300)}
    parameters = {"density": 0.5, **({"epsilon": 0.2} if name == "nan_della" else {})}
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with seeded(0, torch.device("cpu")):
            merged = merge_state_dicts(models, name, base="base", parameters=parameters)
            found.append(merged["w"])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["nan_dare_ties", "nan_della"])
def test_random_methods_give_the_same_bytes(configs, undisturbed, tmp_path, name, monkeypatch):
    assert json.loads(undisturbed(name)["merge_report.json"])["seed"] == 0
    for part in ("order", "stopped", "seed"):
        (tmp_path / part).mkdir()
    stopped(configs[name], tmp_path / "stopped", Stop(merged=12))
    assert merged(configs[name], tmp_path / "stopped")[0] == undisturbed(name)
    seeded = SHARDED.model_copy(update={"random_seed": 5})
    found, _ = merged(configs[name], tmp_path / "seed", options=seeded)
    assert json.loads(found["merge_report.json"])["seed"] == 5
    assert (
        found["model-00002-of-00007.safetensors"]
        != undisturbed(name)["model-00002-of-00007.safetensors"]
    )
    label = GatherTensors.group_label
    monkeypatch.setattr(GatherTensors, "group_label", lambda task: (label(task) or "")[::-1])
    assert merged(configs[name], tmp_path / "order")[0] == undisturbed(name)


WRONG = {
    "nothing is known": lambda name, entry: None,
    "some are wrong": lambda name, entry: (
        TensorHeader(name, entry.dtype, (*entry.shape, 1), entry.nbytes) if hash_of(name) else entry
    ),
    "half is unknown or of another size": lambda name, entry: (
        TensorHeader(name, entry.dtype, (1, *entry.shape[1:]), entry.nbytes // entry.shape[0])
        if hash_of(name)
        else None
    ),
}


def hash_of(name):
    return len(name) % 5 == 0


@pytest.mark.parametrize(
    ("wrong", "size"), [(name, 20_000) for name in WRONG] + [("some are wrong", 0)]
)
def test_wrong_predictions_cost_nothing_but_files(
    configs, undisturbed, tmp_path, monkeypatch, wrong, size
):
    right = run.predicted

    def predicted(*arguments):
        return {name: WRONG[wrong](name, entry) for name, entry in right(*arguments).items()}

    monkeypatch.setattr(run, "predicted", predicted)
    options = SHARDED.model_copy(update={"out_shard_size": size})
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    found, _ = merged(configs["nan_ties"], tmp_path / "whole", options=options)
    stopped(configs["nan_ties"], tmp_path / "stopped", Stop(merged=20), options=options)
    second = Stop()
    assert merged(configs["nan_ties"], tmp_path / "stopped", second, options=options)[0] == found
    assert second.seen["merged"] == TENSORS - 19
    tensors = small.state(tmp_path / "whole" / "out")
    weights = sorted(name for name in found if name.endswith(".safetensors"))
    count = len(weights)
    assert weights == [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    index = json.loads(found["model.safetensors.index.json"])
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, tensor in right_state(undisturbed("nan_ties"), tmp_path).items():
        assert torch.equal(tensors[name], tensor)


def right_state(files, tmp_path):
    folder = tmp_path / "right"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return small.state(folder)
