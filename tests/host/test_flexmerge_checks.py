"""`merge_method: flexmerge`: what is wrong is said at once, before a weight is read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import mergekit_ext
from mergekit_ext.declared import BLOCKS, methods
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.source import Source
from mergekit_ext.host.checks.merge import check_merge, check_source
from mergekit_ext.host.checks.report import CheckReport
from tests import models as small
from tests.host.flexmerge_models import QUIET, rewrite


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("llama"), small.llama)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("bert"), small.bert, amounts=(0.01,))[1][0]


@pytest.fixture
def content(llamas):
    base, tuned = llamas
    return small.config("flexmerge", tuned, base, {"target_size": 2})


def report_of(content: Mapping[str, Any], options: MergeOptions = QUIET) -> CheckReport:
    config = MergeConfiguration.model_validate(dict(content))
    return check_merge(config, options, dict(content))[0]


def places(content: Mapping[str, Any]) -> list[str]:
    return [problem.where for problem in report_of(content).problems]


def only(content: Mapping[str, Any]) -> Problem:
    (problem,) = report_of(content).problems
    return problem


def put(content, **parameters):
    content["parameters"].update(parameters)
    return content


def copied(content, index, folder):
    shutil.copytree(content["models"][index]["model"], folder)
    content["models"][index]["model"] = str(folder)
    return folder


def test_a_good_one_says_what_it_will_do(content, llamas):
    report = report_of(content, MergeOptions(quiet=True, safe_serialization=False))
    assert not report.problems
    # 3 layers of attention, MLP and two norms; embedding, last norm and head.
    assert "15 blocks" in " ".join(report.notes)
    assert "writes safetensors always" in " ".join(report.notes)
    state = small.state(llamas[0])
    for size in (1, 3):
        estimate = report_of(put(content, target_size=size)).estimate
        assert estimate.parameters == size * sum(t.numel() for t in state.values())
        assert estimate.bytes_written == 4 * estimate.parameters
        assert estimate.tensors == size * len(state)


def test_defaults_are_enough_for_every_algorithm(content):
    for name, method in methods(BLOCKS).items():
        target = 2.9 if method.mask else 2
        assert not places(put(content, algorithm=name, target_size=target))


@pytest.mark.parametrize(
    ("granularity", "said"),
    [
        ("layer", "6 blocks: 1 embedding, 3 layer, 1 norm, 1 head"),
        ("model", "1 block: 1 model"),
    ],
)
def test_blocks_are_called_what_they_are(content, granularity, said):
    assert said in " ".join(report_of(put(content, granularity=granularity)).notes)


# One problem

NUMBER = "a number of models such as 2.25"
WHOLE = "a whole number of models from 1 to 3"
# Parameters; which of them is the problem; a part of the message.
PARAMETERS = [
    ({"algorithm": "task_aritmetic"}, "algorithm", "task_arithmetic"),
    ({"algorithm": "ties", "dare_density": 0.5}, "trim_scope", "Write `trim_scope: block`."),
    ({"algorithm": "average", "density": 0.3}, "density", "`flexmerge` with `average` does not"),
    ({"algorithm": "average", "density": 0.3}, "density", "`algorithm:`: ties, consensus, pcb and"),
    ({"algorithm": "average", "gamma": 0.1}, "gamma", "`flexmerge` with `average` does not"),
    *(({"target_size": size}, "target_size", NUMBER) for size in ("abc", -0.5, True, 10**400)),
    ({"target_size": 0.99}, "target_size", "1 to 3"),
    ({"target_size": 3.01}, "target_size", "1 to 3"),
    ({"target_size": "10kB", "algorithm": "average"}, "target_size", "bytes and more"),
    ({"target_size": 1, "algorithm": "emr"}, "target_size", " to 3"),
    ({"target_size": 2, "algorithm": "consensus"}, "target_size", " to 3"),
    ({"target_size": 2.5, "algorithm": "channel_merging"}, "target_size", WHOLE),
    ({"target_size": 4, "algorithm": "channel_merging"}, "target_size", WHOLE),
    ({"target_size": "900kB", "algorithm": "channel_merging"}, "target_size", WHOLE),
]


@pytest.mark.parametrize(("given", "name", "said"), PARAMETERS)
def test_one_parameter(content, given, name, said):
    problem = only(put(content, **given))
    assert problem.where == f"parameters.{name}"
    assert said in str(problem)


# Keys of the document, None to take one out; where the problem is; a part of the message.
KEYS = [
    ({"base_model": None}, "base_model", ""),
    ({"dtype": "int8"}, "dtype", "int8"),
    ({"tokenizer": {"source": "base"}}, "tokenizer", "Remove `tokenizer:`."),
    ({"tokenizer_source": "union"}, "tokenizer_source", "Remove `tokenizer_source:`."),
    ({"chat_template": "auto"}, "chat_template", "Remove `chat_template:`."),
    ({"parameters": {}}, "parameters.target_size", "2.25 (models), or a budget such as '12GB'"),
]


@pytest.mark.parametrize(("keys", "where", "said"), KEYS)
def test_one_key(content, keys, where, said):
    problem = only({k: v for k, v in (content | keys).items() if v is not None})
    assert problem.where == where
    assert said in str(problem)


# Target sizes


def test_the_nearest_size(content):
    problem = only(put(content, target_size=9))
    assert problem.remedy.startswith("Write 3,")
    assert "9 models (numbers below 100000 are models, others bytes)" in problem.found
    assert "100000 bytes" in only(put(content, target_size=100_000)).found


@pytest.mark.parametrize("algorithm", ["average", "emr"])
def test_the_smallest_that_is_named_is_accepted(content, algorithm):
    remedy = only(put(content, target_size=0.5, algorithm=algorithm)).remedy
    named = float(remedy.split()[1])
    assert not places(put(content, target_size=named))
    assert places(put(content, target_size=named - 0.001))
    named = only(put(content, target_size="1kB")).remedy.split()[1].strip("'")
    assert not places(put(content, target_size=named))
    assert places(put(content, target_size=f"{int(named[:-1]) - 1}B"))


@pytest.mark.parametrize(("value", "said"), [("1GB", True), (3, True), (2.99, False)])
def test_nothing_to_merge(content, value, said):
    notes = report_of(put(content, target_size=value)).notes
    assert any("nothing is merged" in note for note in notes) == said


def half(state):
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def test_one_dtype_among_others(content, tmp_path):
    rewrite(copied(content, 1, tmp_path / "half"), half)
    problem = only(put(content, target_size=1))
    assert "dtypes differ" in problem.remedy and "`dtype:`" in problem.remedy
    assert not places({**content, "dtype": "bfloat16"})


def test_masks_over_a_wider_base_do_not_forbid_keeping_everything(content, tmp_path):
    for index in range(3):
        rewrite(copied(content, index, tmp_path / f"{index}"), half)
    assert not places(put(content, target_size=3, algorithm="emr"))


# Parameters


def test_what_is_not_merged_is_named(content):
    base = content["base_model"]
    notes = report_of(put(content, exclude=["*layers.1*", "lm_head.*"])).notes
    (note,) = [note for note in notes if "which is not merged" in note]
    assert note.startswith(f"Every task has {base}'s lm_head.weight, model.layers.1.")


def test_patterns_and_names_of_what_is_not_merged(content):
    found = {p.where: p for p in report_of(put(content, include="layrs*", others="bsae")).problems}
    assert "`*` stands for any letters" in found["parameters.include"].remedy
    assert found.keys() == {"parameters.include", "parameters.others"}
    content["models"][0]["parameters"] = {"exclude": "*"}
    assert "models[0].parameters.exclude" in places(content)


def test_the_nearest_names(content):
    put(content, algorithm="ties", desnity=0.2)
    content["models"][1]["parameters"] = {"wieght": 2}
    found = {p.where: p for p in report_of(content).problems}
    assert "density" in found["parameters.desnity"].remedy
    assert "weight" in found["models[1].parameters.wieght"].remedy
    assert len(found) == 2


@pytest.mark.parametrize("value", [3, ["ties", "average"], ""])
def test_an_algorithm_that_is_no_name(content, value):
    """What takes a parameter that others have is not known then."""
    assert "parameters.algorithm" in places(put(content, algorithm=value, density=0.3))
    assert "parameters.density" not in places(content)


def test_values_that_cannot_be(content):
    wrong = {
        "granularity": "block",
        "linkage": float("nan"),
        "order": "gredy",
        "trim_scope": "layer",
        "similarity_on": "merged",
        "heads": "shared",
        "dare_density": 0,
        "lambda": float("nan"),
        "weight": float("inf"),
        "density": 1.1,
    }
    found = {p.where: p.remedy for p in report_of(put(content, algorithm="ties", **wrong)).problems}
    assert found.keys() == {f"parameters.{name}" for name in wrong}
    assert "greedy" in found["parameters.order"]


@pytest.mark.parametrize("value", [[0.1, 0.5], [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]])
def test_gradients_and_filters(content, value):
    put(content, algorithm="ties", density=value)
    content["models"][0]["parameters"] = {"weight": value}
    found = report_of(content).problems
    assert [p.where for p in found] == ["parameters.density", "models[0].parameters.weight"]
    assert all("no gradients and filters" in p.expected for p in found)


def test_shared_parameters_under_a_model_and_the_other_way_round(content):
    content["models"][1]["parameters"] = {"target_size": 2, "lambda": 1.0}
    assert places(put(content, task="x")) == [
        "models[1].parameters.target_size",
        "models[1].parameters.lambda",
        "models",
    ]


def test_trimming_parameters_without_trimming(content):
    put(content, trim_scope="block", similarity_on="trimmed")
    assert sorted(places(content)) == ["parameters.similarity_on", "parameters.trim_scope"]
    assert not places(put(content, algorithm="ties"))


def test_dare_and_trimming_of_blocks(content):
    put(content, algorithm="ties", dare_density=0.5, trim_scope="model")
    assert only(content).where == "parameters.trim_scope"
    assert not places(put(content, trim_scope="block"))


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "passthrough", "flexmerge"])
def test_methods_that_cannot_merge_groups(content, name):
    assert "parameters.algorithm" in places(put(content, algorithm=name))


def test_required_parameters_of_registered_methods(content):
    put(content, algorithm="linear")
    assert places(content) == [f"models[{i}].parameters.weight" for i in range(3)]
    content["models"][1]["parameters"] = {"weight": 2.0}
    assert places(content) == [f"models[{i}].parameters.weight" for i in (0, 2)]
    assert not places(put(content, weight=1.0))


@pytest.mark.parametrize(
    ("algorithm", "given", "expected"),
    [
        ("lore", {}, "exactly one of mu"),
        ("nan_lore", {"mu": 0.1, "rank_ratio": 0.2}, "exactly one of mu"),
        ("della", {"weight": 1, "density": 0.5, "epsilon": 3}, "parameters that `della` accepts"),
        ("nan_della", {"density": 0.5, "epsilon": 3}, ""),
    ],
)
def test_what_registered_methods_refuse(content, algorithm, given, expected):
    before = torch.random.get_rng_state()
    problem = only(put(content, algorithm=algorithm, **given))
    assert problem.where in ("parameters", "parameters.epsilon")
    assert expected in problem.expected
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", ["nan_ties", "dare_ties", "mergekit:ties"])
def test_densities_of_registered_methods(content, algorithm):
    put(content, algorithm=algorithm, weight=1.0)
    for density in (5, 0, float("nan")):
        content["models"][1]["parameters"] = {"density": density}
        assert only(content).where == "models[1].parameters.density"
    content["models"][1]["parameters"] = {"density": 1}
    assert not places(content)


# Models and tasks


def test_folders_whose_names_cannot_be_tasks(content, tmp_path):
    copied(content, 0, tmp_path / "my model")
    assert only(content).where == "models[0].parameters.task"
    content["models"][0]["parameters"] = {"task": "mine"}
    assert not places(content)


@pytest.mark.parametrize("name", ["a/b", "SHARDS", "x" * 101, 5])
def test_names_that_cannot_be_folders(content, name):
    content["models"][1]["parameters"] = {"task": name}
    problem = only(content)
    assert problem.where == "models[1].parameters.task"
    assert repr(name) in problem.found


def test_names_that_collide(content):
    content["models"][0]["parameters"] = {"task": "Same"}
    content["models"][2]["parameters"] = {"task": "same"}
    assert only(content).found == "two tasks called 'Same' and 'same'"


def test_a_model_twice(content):
    content["models"].append(dict(content["models"][0]))
    problem = only(content)
    assert problem.where == "models[3].model"
    assert "models[0]" in problem.found


def test_slices(content):
    models = content.pop("models")
    content["slices"] = [{"sources": [m | {"layer_range": [0, 3]} for m in models]}]
    assert places(content) == ["slices"]


def test_the_base_among_the_models(content):
    content["models"].insert(0, {"model": content["base_model"], "parameters": {"weight": 2.0}})
    report = report_of(content)
    assert not report.problems
    assert any(text.startswith("models[0].parameters.weight has no") for text in report.warnings)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(content, count):
    content["models"] = [*content["models"][:count], {"model": content["base_model"]}]
    assert only(put(content, target_size=1)).remedy == "Add or take out models."


def test_another_architecture(content, bert):
    content["models"][1] = {"model": str(bert), "parameters": {"task": "bert"}}
    problem = only(content)
    assert problem.where == "models[1].model"
    assert "bert" in problem.found
    assert "llama" in problem.expected


def test_folders_that_cannot_be_read(content, tmp_path):
    content["models"][1]["model"] = "/nowhere/at/all"
    assert places(content) == ["models[1].model"]
    content["models"][1]["model"] = content["models"][0]["model"]
    file = copied(content, 1, tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut" in only(content).found
    file.unlink()
    assert "no weights" in only(content).found
    (tmp_path / "cut" / "config.json").write_text(json.dumps({}))
    assert set(places(content)) == {"models[1].model"}


def test_nothing_in_common(content, tmp_path):
    config = LlamaConfig.from_pretrained(content["base_model"])
    config.hidden_size = 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    content["models"][0]["model"] = str(tmp_path / "narrow")
    assert only(content).where == "models"


def test_tensors_that_were_saved_empty(content, tmp_path):
    folder = copied(content, 0, tmp_path / "zero3")
    rewrite(folder, lambda state: {name: torch.ones(0) for name in state})
    problem = only(content)
    assert problem.where == "models[0].model" and "DeepSpeed" in problem.remedy
    assert "lm_head.weight ([0]; the class has [64, 32])" in problem.found


def test_private_tensors_are_reported(content, tmp_path):
    folder = tmp_path / "larger"
    model = LlamaForCausalLM.from_pretrained(content["models"][0]["model"])
    model.resize_token_embeddings(70)
    model.save_pretrained(folder)
    content["models"][0]["model"] = str(folder)
    report = report_of(content)
    notes = " ".join(report.notes)
    assert not report.problems
    assert (
        "lm_head.weight, model.embed_tokens.weight: differs in larger ([70, 32]) from the base "
        "([64, 32]), so private to every task that has it "
        f"({17920 + 2 * 2 * 64 * 32 * 4:,} bytes in all)" in notes
    )
    assert "come on top of `target_size`" in notes


def test_a_tensor_that_some_models_lack(content, tmp_path):
    lacking = "model.layers.1.mlp.up_proj.weight"
    for index in (0, 2):
        folder = copied(content, index, tmp_path / f"holey{index}")
        rewrite(folder, lambda state: {n: t for n, t in state.items() if n != lacking})
    found = {problem.where: problem.found for problem in report_of(content).problems}
    assert found.keys() == {"models[0].model", "models[2].model"}
    assert lacking in found["models[2].model"] and "holey2" in found["models[2].model"]


def test_a_dtype_that_cannot_be_loaded(content, tmp_path):
    """A header names it; torch has no such dtype."""
    file = copied(content, 0, tmp_path / "packed") / "model.safetensors"
    state = load_file(file)
    state["extra"] = torch.zeros(8, dtype=torch.uint8)
    save_file(state, file, {"format": "pt"})
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["extra"] |= {"dtype": "F4", "shape": [16]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert "extra in F4" in only(content).found


# All at once


def test_everything_at_once_and_no_weight_is_read(content, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda *a: pytest.fail("a weight was read"))
    put(content, target_size="abc", algorithm="average", density=2, order="gredy")
    content["models"][0]["parameters"] = {"task": ".."}
    content["models"][1]["parameters"] = {"wight": 1}
    content["models"][2]["model"] = str(bert)
    content["tokenizer_source"] = "base"
    content["unknown_key"] = 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    with pytest.raises(ConfigError) as caught:
        mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", QUIET)
    found = {problem.where for problem in caught.value.problems}
    assert found >= {
        "parameters.target_size",
        "parameters.density",
        "parameters.order",
        "models[0].parameters.task",
        "models[1].parameters.wight",
        "models[2].model",
        "tokenizer_source",
        "unknown_key",
        "OUT_PATH",
    }
    assert "nothing was done" in str(caught.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["something"]


def test_a_merge_of_what_another_document_will_write(content):
    first = copy.deepcopy(content)
    first |= {"merge_method": "linear", "name": "mean", "parameters": {"weight": 1.0}}
    content["models"][0]["model"] = "mean"
    text = yaml.safe_dump_all([first, content])
    reports = check_source(text, QUIET)
    assert [list(report.problems) for _, report in reports] == [[], []]


def test_a_base_among_the_models_is_named(content, llamas):
    content["models"].insert(1, {"model": str(llamas[0])})
    report = report_of(content)
    assert not report.problems
    (found,) = report.warnings
    assert found == f"models[1]: {llamas[0]} is `base_model`, and so is no task."


def test_tensors_of_residuals_are_counted(content, tmp_path):
    put(content, algorithm="residual", rank=2)
    del content["parameters"]["target_size"]
    told = report_of(content).estimate
    out = mergekit_ext.merge(content, tmp_path / "out", QUIET).path
    files = (out / "shards").rglob("*.safetensors")
    assert told.tensors == sum(len(load_file(file)) for file in files)
    assert "about" in str(mergekit_ext.check(content, QUIET))
