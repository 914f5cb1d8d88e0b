"""``mergekit-ext analyze``: what it measures, what it writes, what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.flexmerge.source import BlockReader
from tests.cli import assert_refused, subcommand
from tests.models import bert, config, family, state, write_yaml

TASKS = ("tuned0", "tuned1", "tuned2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return family(tmp_path_factory.mktemp("models"), bert)


def written(
    folder: Path, inputs: tuple[Path, list[Path]], parameters: Mapping[str, Any] | None = None
) -> Path:
    base, models = inputs
    document = config("flexmerge", models, base, parameters or {})
    return write_yaml(folder / "merge.yml", document)


run = partial(subcommand, "analyze")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_similarities_are_the_naive_ones(inputs: Any, tmp_path: Path) -> None:
    result = run(written(tmp_path, inputs), tmp_path / "out")
    assert result.exit_code == 0, result.output
    base, models = state(inputs[0]), [state(path) for path in inputs[1]]
    found = {row["block"]: row for row in rows(tmp_path / "out" / "similarity.csv")}
    attention = [name for name in base if "layer.1.attention" in name and "LayerNorm" not in name]
    (block,) = [name for name in found if "layer.1." in name and found[name]["kind"] == "attention"]
    vectors = [
        torch.cat([(m[t].double() - base[t].double()).reshape(-1) for t in attention])
        for m in models
    ]
    pairs = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(vectors, 2)]
    row = found[block]
    assert int(row["elements"]) == len(vectors[0]) and row["depth"] == "1"
    assert float(row["lowest"]) == pytest.approx(min(pairs), abs=1e-6)
    assert float(row["mean"]) == pytest.approx(math.fsum(pairs) / 3, abs=1e-6)
    assert float(row["highest"]) == pytest.approx(max(pairs), abs=1e-6)
    for task, vector in zip(TASKS, vectors, strict=True):
        assert float(row[f"norm/{task}"]) == pytest.approx(float(vector.norm()), rel=1e-6)
    assert f"{min(pairs):7.3f} {math.fsum(pairs) / 3:7.3f} {max(pairs):7.3f}" in result.stdout


@pytest.mark.parametrize("algorithm", ["task_arithmetic", "emr", "channel_merging"])
def test_the_steps_are_the_sizes_of_merges(inputs: Any, tmp_path: Path, algorithm: str) -> None:
    base, models = inputs
    result = run(written(tmp_path, inputs, {"algorithm": algorithm}), tmp_path / "out")
    assert result.exit_code == 0, result.output
    steps = rows(tmp_path / "out" / "steps.csv")
    assert float(steps[0]["models"]) == 3 and steps[0]["similarity"] == ""
    for number in (0, len(steps) // 2, len(steps) - 1):
        size = float(steps[number]["models"])
        document = config("flexmerge", models, base, {"target_size": size, "algorithm": algorithm})
        out = tmp_path / str(number)
        mergekit_ext.merge(write_yaml(tmp_path / "m.yml", document), out, MergeOptions(quiet=True))
        manifest = json.loads((out / "flexmerge.json").read_text())
        assert manifest["size"]["models"] == pytest.approx(size, rel=1e-12)
        assert manifest["size"]["bytes"] == int(steps[number]["bytes"])
    assert len(steps) == 3 if algorithm == "channel_merging" else len(steps) > 20


def test_every_step_names_its_merge_and_all_is_drawn(inputs: Any, tmp_path: Path) -> None:
    parameters = {"target_size": 0.01}  # which is not used
    assert run(written(tmp_path, inputs, parameters), tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, list[str]] = {}
    for row in rows(tmp_path / "out" / "steps.csv")[1:]:
        found.setdefault(row["block"], []).append(row["groups"])
    blocks = [row["block"] for row in rows(tmp_path / "out" / "similarity.csv")]
    assert set(found) == set(blocks)
    for first, second in found.values():
        assert set(first.split(" + ")) < set(TASKS)
        assert sorted(second.replace(" + ", ", ").split(", ")) == [*TASKS]


def test_a_rerun_and_a_merge_use_the_analysis_again(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = inputs
    passes = []
    stock = BlockReader.read

    def spy(self: BlockReader, block: Any, members: Any = None) -> Any:
        if members is None:  # all models: a pass that measures
            passes.append(block.name)
        return stock(self, block, members)

    monkeypatch.setattr(BlockReader, "read", spy)
    path = written(tmp_path, inputs, {"algorithm": "ties"})
    first = run(path, tmp_path / "out")
    assert first.exit_code == 0 and passes
    passes.clear()
    again = run(path, tmp_path / "out")
    assert again.exit_code == 0 and again.stdout == first.stdout and not passes
    document = config("flexmerge", models, base, {"target_size": 2.0, "algorithm": "ties"})
    merge = write_yaml(tmp_path / "m.yml", document)
    for place in (tmp_path / "merge", tmp_path / "out" / "merge"):
        mergekit_ext.merge(merge, place, MergeOptions(quiet=True))
    assert not passes


def test_files_and_no_plot(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["flexmerge_analysis.json", "similarity.csv", "steps.csv"]
    path = written(tmp_path, inputs)
    assert run(path, tmp_path / "none", "--no-plot").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "none").iterdir()) == names
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "similarity.png").touch()  # of an earlier run
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run(path, tmp_path / "missing")
    assert result.exit_code == 0 and "mergekit-ext[plots]" in result.stdout
    assert sorted(p.name for p in (tmp_path / "missing").iterdir()) == names


def test_two_models_of_which_one_is_the_base(tmp_path: Path) -> None:
    family(tmp_path / "same", bert, amounts=(0.0, 0.01))
    same = tmp_path / "same"
    result = run(
        written(tmp_path, (same / "base", [same / "tuned0", same / "tuned1"])), tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    found = rows(tmp_path / "out" / "similarity.csv")
    assert {row["highest"] for row in found} == {"0.0"}
    assert {row["norm/tuned0"] for row in found} == {"0.0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "linear"}, "merge_method: found 'linear'; expected 'flexmerge'"),
        ({"dytpe": "float32"}, "Write `dtype`"),
    ],
)
def test_wrong_configurations(
    inputs: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base, models = inputs
    document = {**config("flexmerge", models, base, {}), **changes}
    assert_refused(run(write_yaml(tmp_path / "m.yml", document), tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_residuals_have_no_groups(inputs: Any, tmp_path: Path) -> None:
    file = written(tmp_path, inputs, {"algorithm": "residual", "rank": 2})
    assert_refused(run(file, tmp_path / "out"), "`mergekit-ext check` names the sizes")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written(inputs: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(run(written(tmp_path, inputs), tmp_path / "file" / "out"), "OUT_PATH")
