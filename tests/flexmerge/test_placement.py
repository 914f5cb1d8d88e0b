"""Models over several devices: the same results, what is shared in one place, counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError
from mergekit_ext.flexmerge import load
from tests.flexmerge.handmade import models, write
from tests.flexmerge.test_runtime import KINDS, MLP, TASKS, dense, independent, logits, same


@pytest.fixture(scope="module", params=["bert", "tied llama", "mixtral"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    make, private, _ = KINDS[request.param]
    folder = tmp_path_factory.mktemp("placement")
    base, paths = models(folder, make, TASKS)
    write(folder / "out", base, paths, dense, private)
    return folder / "out", request.param


def held(loaded: dict[str, Any]) -> int:
    """The bytes of all different tensors in memory."""
    tensors = [t for model in loaded.values() for t in (*model.parameters(), *model.buffers())]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.device.type != "meta"}.values())


def largest(model: Any) -> int:
    """accelerate keeps memory for the largest part that must stay whole, of all tasks here."""
    parts = [p for p in model.modules() if type(p).__name__ in model._no_split_modules]
    tables = [p for p in model.modules() if isinstance(p, torch.nn.Embedding)]
    return len(TASKS) * max(sum(p.nbytes for p in part.parameters()) for part in parts + tables)


def equal(loaded: dict[str, Any], out: Path, kind: str) -> None:
    for task, model in loaded.items():
        assert torch.equal(logits_of(model, kind), logits(independent(out, task), kind))


def logits_of(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        return model(**KINDS[kind][2]()).logits


def test_what_tasks_share_counts_once(made: tuple[Path, str]) -> None:
    out, kind = made
    plain = load(out)
    once = held(plain)
    assert sum(sum(p.nbytes for p in m.parameters()) for m in plain.values()) > 1.5 * once
    memory = {"cpu": once + largest(plain["a"]) + 4096}
    loaded = load(out, device_map="auto", max_memory=memory)
    assert held(loaded) == once
    equal(loaded, out, kind)


def test_what_does_not_fit_is_read_when_it_is_needed(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    out, kind = made
    plain = load(out)
    limit = held(plain) // 2
    folder = tmp_path if kind == "mixtral" else None
    loaded = load(
        out,
        device_map="auto",
        max_memory={"cpu": limit + largest(plain["a"]) // 2},
        offload_folder=folder,
    )
    assert any(p.device.type == "meta" for p in loaded["a"].parameters())
    assert held(loaded) <= limit + largest(plain["a"]) // 2
    equal(loaded, out, kind)
    # Stacked experts, shared by three tasks and written once; the rest is in the checkpoint.
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (0 < written < held(plain)) if kind == "mixtral" else not written


def test_a_map_of_ones_own(made: tuple[Path, str]) -> None:
    """torch copies from "cpu" to "cpu:0", which stands for an accelerator here."""
    out, kind = made
    first = "bert" if kind == "bert" else "model"
    plain = load(out)
    loaded = load(out, device_map={"": "cpu:0", first: "cpu:0"})
    a, b, c, d = loaded.values()
    assert same(a, b, "att") == same(c, d, "att") == same(a, c, MLP[kind]) == {True}
    assert same(b, c, "att") == {False}
    assert same(a, plain["a"], "att") == {False}
    assert held(loaded) == held(plain)
    equal(loaded, out, kind)


@pytest.mark.parametrize("made", ["mixtral"], indirect=True)
def test_a_folder_is_asked_for_when_the_checkpoint_has_no_such_tensor(
    made: tuple[Path, str],
) -> None:
    with pytest.raises(ConfigError, match="offload_folder: found none"):
        load(made[0], device_map={"": "disk"})


@pytest.mark.parametrize("made", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "somewhere"}, "'somewhere'; expected 'auto'"),
        ({"device_map": {"bert": "cpu"}}, "no place for classifier.bias"),
        ({"device_map": {"": "cpu", "bort": "cpu"}}, "such as bert, classifier"),
        ({"device_map": {"": "cuda:77"}}, "a device that is here"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "with device_map='auto' only"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "sizes such as '20GB'"),
        ({"max_memory": {"cpu": 1}}, "device_map='auto' only"),
        ({"device_map": "auto", "device": "meta"}, "one of the two"),
        ({"offload_folder": "somewhere"}, "offload_folder: found it; expected it with device_map"),
    ],
)
def test_what_cannot_be_is_one_error(
    made: tuple[Path, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as found:
        load(made[0], **options)
    assert message in str(found.value)
