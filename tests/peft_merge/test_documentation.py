"""docs/adapters.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration

import peft_merge
from mergekit_ext import callbacks, flexmerge
from mergekit_ext.core.parameters import REQUIRED
from mergekit_ext.declared import ADAPTERS
from mergekit_ext.errors import ConfigError
from peft_merge.algebra.spaces import SPACES
from peft_merge.cli import main
from peft_merge.io.read import load_adapter
from peft_merge.live import COMBINATION_TYPES
from peft_merge.merge import check, merge_adapters
from peft_merge.modules import VECTOR_SPACES, rules
from tests.peft_merge.models import KINDS, saved

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "adapters.md").read_text(encoding="utf-8")
FLEXMERGE = (DOCS / "adapters-flexmerge.md").read_text(encoding="utf-8")
YAML = r"```yaml\n(.*?)```"


@pytest.mark.parametrize("package", [peft_merge, callbacks, flexmerge])
def test_public_names_are_listed(package):
    assert set(package.__all__) <= set(dir(package))


def tables():
    """All table rows, as lists of cells, by the section's title."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in TEXT.splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("| ") and not line.startswith("| ---"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found.setdefault(title, []).append([cell.strip() for cell in cells])
    return found


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_methods():
    listed = {}
    for names, _, shared, own in tables()["Methods"][1:]:
        for name in quoted(names):
            listed[name] = ("†" in names, quoted(shared), quoted(own))
    plain = {name: rule for name, rule in rules().items() if not name.startswith("nan_")}
    assert set(listed) == {*plain, "nan_<method>"}
    for name, rule in plain.items():
        exact, shared, own = listed[name]
        given = rule.for_driver(ADAPTERS)
        if name != "nan":
            assert exact == rule.invariant({p.name: p.default for p in given}), name
        for parameters, per_model in ((shared, False), (own, True)):
            known = {p.name for p in given if p.per_model is per_model} - {"weight"}
            assert set(parameters) == known or name == "nan", (name, parameters, known)


@pytest.mark.parametrize("name", sorted(n for n in rules() if not n.startswith("nan")))
def test_defaults_in_the_table(name):
    (row,) = [row for row in tables()["Methods"][1:] if name in quoted(row[0])]
    position = quoted(row[0]).index(name)
    for parameter in rules()[name].parameters:
        cell = row[3 if parameter.per_model else 2]
        said = re.search(rf"`{parameter.name}` ([\w., ]+?)(?:[;`]|, `|$)", cell)
        if said is None or parameter.default in (None, REQUIRED):
            continue
        values = [value.strip() for value in said[1].split(",") if value.strip()]
        value = values[position] if len(values) > 1 else values[0]
        if value.startswith(("max", "tol")):
            continue
        assert value == str(parameter.default).lower().removesuffix(".0"), parameter.name


def test_the_tables_of_spaces_and_combination_types():
    spaces = {name for row in tables()["Space"] for name in quoted(row[0])} - {"space"}
    assert spaces == set(SPACES) - {"delta"}
    assert VECTOR_SPACES[0] == "additive"
    for names, method in tables()["In a live model"][1:]:
        for name in quoted(names):
            assert COMBINATION_TYPES[name].method == quoted(method)[0]


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("merge", r"peft-merge CONFIG OUT (\[.*)"),
        ("extract", r"peft-merge extract BASE MODEL OUT (.*)"),
    ],
)
def test_the_options_of_a_command(name, usage):
    found = re.search(usage, TEXT)
    assert found is not None
    parameters = main.commands[name].params
    options = {option for p in parameters for option in p.opts if option.startswith("--")}
    assert set(re.findall(r"--[\w-]+", found[1])) == options


def test_the_yaml_parses():
    for block in re.findall(YAML, TEXT + FLEXMERGE, re.DOTALL):
        assert isinstance(yaml.safe_load(block), dict)


def test_a_size_that_mixed_ranks_reach_with_a_rank(tmp_path, monkeypatch):
    for name, rank in (("small", 4), ("large", 16)):
        saved(KINDS["rank_one"], tmp_path / name, rank, r=rank)
    monkeypatch.chdir(tmp_path)
    documents = [yaml.safe_load(block) for block in re.findall(YAML, FLEXMERGE, re.DOTALL)]
    (document,) = [found for found in documents if "rank" in found]
    assert check(document).rank == 8
    del document["rank"]
    with pytest.raises(ConfigError, match=r"1\.6 to 2 adapters"):
        check(document)


def test_pcb_gives_one_adapter_back_without_density_and_clip(tmp_path):
    assert "`density: 1`; `pcb` also needs `clip: 0`" in TEXT
    adapter = load_adapter(saved(KINDS["plain"], tmp_path / "one", 1))
    module = next(iter(adapter.infos))
    wanted = adapter.load(module).dense()
    for clip, same in ((0, True), (0.01, False)):
        parameters = {"density": 1, "clip": clip}
        merged = merge_adapters([adapter], "pcb", parameters=parameters).adapter
        assert torch.allclose(merged.load(module).dense(), wanted, atol=1e-5) is same


def test_paths_in_a_file_are_those_of_the_current_directory(tmp_path, monkeypatch):
    saved(KINDS["plain"], tmp_path / "one", 1)
    (tmp_path / "else").mkdir()
    for model in ("./one", "~/one"):
        text = f"merge_method: linear\nmodels:\n- model: {model}\n"
        (tmp_path / "else" / "merge.yml").write_text(text)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert check("else/merge.yml").adapters[0].name == "one"
    monkeypatch.chdir(tmp_path / "else")
    (tmp_path / "else" / "merge.yml").write_text(text.replace("~", "."))
    with pytest.raises(ConfigError, match="no such folder"):
        check("merge.yml")


def test_models_with_adapters_are_read_as_mergekit_reads_them():
    documents = [yaml.safe_load(block) for block in re.findall(YAML, TEXT, re.DOTALL)]
    (document,) = [each for each in documents if "+" in str(each.get("models", ""))]
    parsed = MergeConfiguration.model_validate(document)
    assert {model.lora.path for model in parsed.referenced_models()} == {
        "./lora-code",
        "./lora-maths",
    }


def test_the_first_example_runs(tmp_path, monkeypatch):
    for name, seed in (("lora-code", 1), ("lora-maths", 2)):
        saved(KINDS["plain"], tmp_path / name, seed, r=16)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(blocks[0], {})
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()
    document = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0])
    document["models"][1]["model"] = "./lora-maths"
    plan = check(document)
    assert (plan.request.method, plan.rank) == ("ties", 16)
