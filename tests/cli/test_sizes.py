"""``mergekit-ext sizes``: options, exit codes, messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli import assert_refused, subcommand
from tests.models import config, family, llama, write_yaml

SCORES = """
import numpy as np


def evaluate(model, task):
    return {"logit": 1 + np.float32(len(task))}


def broken(model, task):
    return "good"


def explode(model, task):
    raise RuntimeError("out of luck")


def alone(model):
    return 1.0


number = 3
"""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base, models = family(folder, llama)
    return write_yaml(folder / "merge.yml", config("flexmerge", models, base))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of evaluations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "scores_of_a_test.py").write_text(SCORES)
    yield tmp_path
    sys.modules.pop("scores_of_a_test", None)


run = partial(subcommand, "sizes")


def test_a_function_of_the_working_directory(configuration: Path, here: Path) -> None:
    chosen = ("--sizes", "1", "--algorithm", "ties", "--algorithm", "emr")
    result = run(configuration, "out", *chosen, "--evaluate", "scores_of_a_test:evaluate")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "flexmerge_analysis.json",
        "sizes.csv",
        "sizes.json",
        "sizes.png",
    ]
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["algorithm", "size", "bytes", "mean", "logit", "normalised"]
    assert [line.split()[0] for line in lines] == ["ties", "emr"]
    assert [line.split()[-2:] for line in lines] == [["7.0000", "1.000"]] * 2
    assert "6/6" in result.stderr


def test_quiet_shows_the_table_alone_and_events_go_to_a_file(
    configuration: Path, here: Path
) -> None:
    given = ("--sizes", "1,3", "--evaluate", "scores_of_a_test:evaluate", "--quiet")
    result = run(configuration, "out", *given, "--events", "e.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stderr == "" and len(result.stdout.splitlines()) == 3
    events = [json.loads(line) for line in (here / "e.jsonl").read_text().splitlines()]
    assert [e["models"] for e in events if e["event"] == "size_reached"] == [3.0, 1.0]


def test_sizes_alone(configuration: Path, here: Path) -> None:
    result = run(configuration, "out", "--sizes", " all , 1.5")
    assert result.exit_code == 0, result.output
    points = json.loads((here / "out" / "sizes.json").read_text())["points"]
    assert len(points) > 10 and points[-1]["size"] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("1,,2", "--sizes: found ''"),
        ("nan", "--sizes: found 'nan'"),
        ("1;2", "--sizes: found '1;2'"),
        ("All", "--sizes: found 'All'"),
        ("1,5", "--sizes: found 5; expected sizes from 1 to 3"),
    ],
)
def test_wrong_sizes(configuration: Path, here: Path, sizes: str, message: str) -> None:
    assert_refused(run(configuration, "out", "--sizes", sizes), message)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scores_of_a_test", "Write scores:evaluate for scores.py"),
        ("a/b/scores.py:f", "No module named 'a/b/scores'"),
        ("scores_of_a_test:missing", "has no attribute 'missing'"),
        ("no_such_module:evaluate", "No module named 'no_such_module'"),
        (":evaluate", "MODULE:FUNCTION"),
        ("scores_of_a_test:number", "expected a function"),
        ("scores_of_a_test:alone", "expected a function of a module and a task"),
        ("scores_of_a_test:broken", "tuned0's individual model returned 'good'"),
    ],
)
def test_wrong_evaluations(configuration: Path, here: Path, name: str, message: str) -> None:
    assert_refused(run(configuration, "out", "--evaluate", name), message)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
    ids=["syntax", "exits"],
)
def test_modules_that_cannot_be_imported(
    configuration: Path, here: Path, text: str, message: str
) -> None:
    (here / "broken_module_of_a_test.py").write_text(text)
    assert_refused(run(configuration, "out", "--evaluate", "broken_module_of_a_test:f"), message)
    assert not (here / "out").exists()


def test_the_users_own_error_is_shown_without_frames_of_ours(
    configuration: Path, here: Path
) -> None:
    result = run(configuration, "out", "--evaluate", "scores_of_a_test:explode")
    assert_refused(result, "tuned0's individual model raised")
    assert "RuntimeError: out of luck" in result.output
    assert 'scores_of_a_test.py", line' in result.output
    assert "mergekit_ext" not in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "linear"}, "merge_method: found 'linear'; expected 'flexmerge'"),
        ({"parameters": {"lambada": 1}}, "Write `lambda`"),
    ],
)
def test_wrong_configurations(
    configuration: Path, here: Path, changes: dict[str, Any], message: str
) -> None:
    document = {**yaml.safe_load(configuration.read_text()), **changes}
    assert_refused(run(write_yaml(here / "wrong.yml", document), "out"), message)
    assert not (here / "out").exists()


def test_broken_yaml(here: Path) -> None:
    (here / "broken.yml").write_text("models: [")
    assert_refused(run("broken.yml", "out"), "expected YAML")


def test_folders_that_cannot_be_written(configuration: Path, here: Path) -> None:
    (here / "file").write_text("")
    assert_refused(run(configuration, here / "file"), "is a file")
    assert_refused(run(configuration, here / "file" / "out"), "OUT_PATH")
    events = here / "none" / "events.jsonl"
    assert_refused(run(configuration, "out", "--events", events), "No such file")
    (here / "model").mkdir()
    (here / "model" / "config.json").touch()
    assert_refused(run(configuration, "model"), "holds another output (config.json)")
