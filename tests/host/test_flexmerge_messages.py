"""What `flexmerge` says of sizes, dtypes and settings: the right remedy, and each thing once."""

from __future__ import annotations

import shutil

import pytest
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_ext.host.checks.merge import check_merge
from tests import models as small
from tests.host.flexmerge_models import QUIET


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    amounts = (0.01, 0.02, 0.03, 0.04)
    return small.family(tmp_path_factory.mktemp("llama"), small.llama, amounts=amounts)


@pytest.fixture
def content(llamas):
    base, tuned = llamas
    return small.config("flexmerge", tuned, base, {"target_size": 2})


def report_of(content, options=QUIET):
    return check_merge(MergeConfiguration.model_validate(content), options, content)


def only(content):
    (problem,) = report_of(content).problems
    return problem


def copied(content, index, folder):
    shutil.copytree(content["models"][index]["model"], folder)
    content["models"][index]["model"] = str(folder)
    return folder / "model.safetensors"


# Sizes


@pytest.mark.parametrize("value", ["2,25", "nonsense", "1e9", -1])
def test_no_size(content, value):
    content["parameters"]["target_size"] = value
    assert only(content).remedy == "Write 2.25 (models), or a budget such as '12GB'."


def test_the_nearest_size(content):
    content["parameters"]["target_size"] = 9
    problem = only(content)
    assert problem.remedy.startswith("Write 4,")
    assert "9 models" in problem.found
    assert "numbers below 100000 are models" in problem.found
    assert report_of(content).estimate is None
    content["parameters"]["target_size"] = 0.5
    assert only(content).remedy == "Write 1 for the smallest."
    content["parameters"]["target_size"] = 100_000
    problem = only(content)
    assert "100000 bytes" in problem.found
    assert "others bytes" in problem.found


@pytest.mark.parametrize(("value", "said"), [("1GB", True), (4, True), (3.99, False)])
def test_nothing_to_merge(content, value, said):
    content["parameters"]["target_size"] = value
    notes = report_of(content).notes
    assert any("nothing is merged" in note for note in notes) == said


def test_one_dtype_among_others(content, tmp_path):
    file = copied(content, 1, tmp_path / "half")
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    content["parameters"]["target_size"] = 1
    problem = only(content)
    assert "dtypes differ, bfloat16, float32" in problem.expected
    assert "`dtype:`" in problem.remedy
    content["dtype"] = "bfloat16"
    assert not report_of(content).problems


# Each once


@pytest.mark.parametrize("keys", [{"tokenizer": {"source": "base"}}, {"tokenizer_source": "union"}])
def test_a_tokenizer(content, keys):
    problem = only(content | keys)
    assert problem.remedy == f"Remove `{next(iter(keys))}:`."


def test_weights_that_cannot_be_read(content, tmp_path):
    file = copied(content, 1, tmp_path / "cut")
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut" in only(content).found
    file.unlink()
    assert "no weights" in only(content).found


def test_a_name_that_is_a_list(content):
    content["models"][1]["parameters"] = {"task": ["x"]}
    problem = only(content)
    assert problem.where == "models[1].parameters.task"
    assert "Write a name" in problem.remedy


def test_a_model_twice(content):
    content["models"].append(dict(content["models"][0]))
    assert only(content).where == "models[4].model"
    content["models"] = [content["models"][0]] * 2
    assert only(content).where == "models[1].model"


# What is merged


@pytest.mark.parametrize(
    ("granularity", "said"),
    [
        ("layer", "6 blocks: 1 embedding, 3 layer, 1 norm, 1 head"),
        ("model", "1 block: 1 model"),
    ],
)
def test_blocks_are_called_what_they_are(content, granularity, said):
    content["parameters"]["granularity"] = granularity
    assert any(said in note for note in report_of(content).notes), report_of(content).notes


def test_the_estimate_is_of_what_is_written(content, llamas):
    parameters = sum(t.numel() for t in small.state(llamas[0]).values())
    for size in (1, 2, 4):
        content["parameters"]["target_size"] = size
        estimate = report_of(content).estimate
        assert estimate.parameters == size * parameters
        assert estimate.bytes_written == 4 * estimate.parameters
        assert estimate.tensors == size * len(small.state(llamas[0]))


def test_pickles_are_not_written(content):
    options = MergeOptions(quiet=True, safe_serialization=False)
    assert "writes safetensors" in " ".join(report_of(content, options).notes)
