"""`mergekit_ext.merge` and ``mergekit-ext merge``: callbacks, errors, what is left behind."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import LlamaForCausalLM

import mergekit_ext
from mergekit_ext.errors import ConfigError, UniformCoefficientsWarning
from mergekit_ext.events import MergeCallback
from tests import models as small
from tests.reference import nan as reference


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("llama"), small.llama)


class Listener(MergeCallback):
    def __init__(self, stop_at: int | None = None):
        self.names, self.coefficients, self.iterations, self.closed = [], {}, 0, 0
        self.shards, self.stop_at, self.work = [], stop_at, {}

    def on_merge_begin(self, event):
        self.work = event.work

    def on_statistics_end(self, event):
        self.coefficients = event.coefficients

    def on_solver_iteration(self, event):
        self.iterations += 1

    def on_tensor_merged(self, event):
        self.names.append(event.name)
        if self.stop_at == len(self.names):
            raise RuntimeError("enough")

    def on_shard_written(self, event):
        self.shards.append(event)

    def close(self):
        self.closed += 1


QUIET = MergeOptions(quiet=True)


def test_callbacks_hear_of_every_tensor(llamas, tmp_path):
    base, tuned = llamas
    listener = Listener()
    config = small.write_yaml(
        tmp_path / "merge.yml", small.config("nan", tuned, base, {"granularity": "block"})
    )
    mergekit_ext.merge(config, tmp_path / "out", QUIET, callbacks=[listener])
    names = small.state(base).keys()
    assert set(listener.names) == set(names)
    sizes = {name: float(4 * tensor.numel()) for name, tensor in small.state(base).items()}
    assert listener.work == sizes
    assert listener.closed == 1
    assert "model.layers.0.attention" in listener.coefficients
    (shard,) = listener.shards
    assert shard.path == str(tmp_path / "out" / "model.safetensors")
    assert shard.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("form", ["path", "text", "configuration"])
def test_a_configuration_in_three_forms(llamas, tmp_path, form):
    base, tuned = llamas
    content = small.config("nan", tuned, base)
    config = {
        "path": small.write_yaml(tmp_path / "merge.yml", content),
        "text": yaml.safe_dump(content),
        "configuration": MergeConfiguration.model_validate(content),
    }[form]
    mergekit_ext.merge(config, tmp_path / "out", QUIET)
    wanted = reference.merge([small.state(t) for t in tuned], small.state(base))
    for name, tensor in small.state(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=3e-6, atol=3e-6)
    assert "merge_method: nan" in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_merges_with_stock_methods_too(llamas, tmp_path):
    base, tuned = llamas
    listener = Listener()
    content = small.config("task_arithmetic", tuned, base, {"weight": 0.5})
    mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", QUIET, callbacks=[listener])
    assert len(listener.names) == len(small.state(tmp_path / "out"))
    assert [shard.path for shard in listener.shards] == [str(tmp_path / "out/model.safetensors")]


def test_solver_iterations_are_heard(llamas, tmp_path):
    _, tuned = llamas
    listener = Listener()
    content = small.config("lore", tuned, None, {"mu_relative": 0.5})
    mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", QUIET, callbacks=[listener])
    assert listener.iterations > len(listener.names)
    # A vector takes no product, and longer sides take more than by their bytes.
    assert listener.work["model.norm.weight"] == 0
    wide, square = (f"model.layers.0.{n}.weight" for n in ("mlp.up_proj", "self_attn.q_proj"))
    assert listener.work[wide] > listener.work[square] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "### LoRE solver" in card
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]
    assert report["lm_head.weight"]["converged"] is True
    assert len(report["lm_head.weight"]["singular_values"]) == 3


def test_a_callback_that_raises_stops_the_merge_and_leaves_nothing(llamas, tmp_path):
    base, tuned = llamas
    listener = Listener(stop_at=3)
    content = small.config("nan", tuned, base)
    with pytest.raises(RuntimeError, match="enough"):
        mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", QUIET, callbacks=[listener])
    assert listener.closed == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("callback", [Listener, 3])
def test_what_is_no_callback_is_reported_before_any_work(llamas, tmp_path, callback):
    base, tuned = llamas
    content = yaml.safe_dump(small.config("nan", tuned, base))
    with pytest.raises(TypeError, match="callbacks: found"):
        mergekit_ext.merge(content, tmp_path / "out", QUIET, callbacks=[callback])
    assert list(tmp_path.iterdir()) == []


def test_callbacks_are_closed_whatever_happens(llamas, tmp_path):
    class Raises(Listener):
        def on_merge_end(self, event):
            raise RuntimeError("late")

    base, tuned = llamas
    listener = Raises()
    content = yaml.safe_dump(small.config("nan", tuned, base))
    with pytest.raises(RuntimeError, match="late"):
        mergekit_ext.merge(content, tmp_path / "out", QUIET, callbacks=[listener])
    assert listener.closed == 1


def test_a_warning_that_is_an_error_does_not_cost_the_merge(tmp_path):
    _, tuned = small.family(tmp_path / "close", small.llama, amounts=(1e-4, 2e-4))
    content = yaml.safe_dump(small.config("nan", tuned))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UniformCoefficientsWarning)
        with pytest.raises(UniformCoefficientsWarning):
            mergekit_ext.merge(content, tmp_path / "out", QUIET)
    assert small.state(tmp_path / "out").keys() == small.state(tuned[0]).keys()


def test_problems_are_one_error(llamas, tmp_path):
    _, tuned = llamas
    content = small.config("lore", tuned, None, {"combin": "sum", "mu": -1})
    with pytest.raises(ConfigError) as caught:
        mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", QUIET)
    assert len(caught.value.problems) >= 2
    assert list(tmp_path.iterdir()) == []


def test_without_a_base_the_first_model_gives_the_configuration(llamas, tmp_path):
    _, tuned = llamas
    for order in (tuned, tuned[::-1]):
        out = tmp_path / order[0].name
        content = small.config("lore", order, None, {"mu_relative": 0.9})
        mergekit_ext.merge(yaml.safe_dump(content), out, QUIET)
        listed = [line for line in (out / "README.md").read_text().splitlines() if "* " in line]
        assert [line.split("/")[-1].rstrip(")") for line in listed] == [m.name for m in order]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("nan", None), ("task_arithmetic", {"weight": 0.5}), ("flexmerge", {"target_size": 1.5})],
)
def test_a_local_folder_called_like_a_repository_is_local(
    llamas, tmp_path, monkeypatch, method, parameters
):
    def asked(*arguments, **options):
        raise ConnectionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.repo_exists", asked)
    base, tuned = llamas
    (tmp_path / "big").mkdir()
    shutil.copytree(base, tmp_path / "big" / "base")
    monkeypatch.chdir(tmp_path)
    content = small.config(method, tuned[:2], "big/base", parameters)
    mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "big/base" in card
    assert "huggingface.co/big/base" not in card


def test_a_second_merge_reads_files_that_were_replaced(llamas, tmp_path):
    base, tuned = llamas
    content = yaml.safe_dump(small.config("nan", [tmp_path / "model"], base))
    for source, shard in ((tuned[0], "5GB"), (tuned[1], "20KB")):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        model = LlamaForCausalLM.from_pretrained(source)
        model.save_pretrained(tmp_path / "model", max_shard_size=shard)
        mergekit_ext.merge(content, tmp_path / "out", QUIET)
        for name, tensor in small.state(tmp_path / "out").items():
            torch.testing.assert_close(tensor, small.state(source)[name], rtol=3e-6, atol=3e-6)


def test_the_command(llamas, tmp_path):
    base, tuned = llamas
    config = small.write_yaml(tmp_path / "merge.yml", small.config("nan_ties", tuned, base))
    events = tmp_path / "events.jsonl"
    arguments = (config, tmp_path / "out", "--events", events, "--quiet")
    done = small.command_here("mergekit-ext", "merge", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(events.read_text().splitlines()[-1])["event"] == "merge_end"
    assert small.state(tmp_path / "out").keys() == small.state(base).keys()


def test_what_is_in_the_place_of_the_output_is_named_or_refused(llamas, tmp_path, capsys):
    base, tuned = llamas
    content, out = small.config("nan", tuned, base), tmp_path / "out"
    for said in (False, True):
        mergekit_ext.merge(content, out)
        assert (f"The model that is in {out} gives way" in capsys.readouterr().err) == said
    for kind in ("adapter_config.json", "flexmerge.json"):
        (out / kind).touch()  # which would decide what the folder is
        with pytest.raises(ConfigError, match=f"which holds another output .{kind}"):
            mergekit_ext.merge(content, out, QUIET)
        (out / kind).unlink()


def test_the_command_lists_problems_without_a_traceback(llamas, tmp_path):
    _, tuned = llamas
    config = small.write_yaml(tmp_path / "merge.yml", small.config("lore", tuned))
    done = small.command_here("mergekit-ext", "merge", config, tmp_path / "out")
    assert done.returncode == 2
    assert "exactly one of mu, mu_relative, rank_ratio" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_multi_merge_with_a_misspelt_key_stops_at_once(llamas, tmp_path):
    base, tuned = llamas
    content = {"name": "first", **small.config("nan", tuned, base), "paramters": {"scale": 1}}
    config = small.write_yaml(tmp_path / "merge.yml", content)
    done = small.command_here("mergekit-multi", config, "-I", tmp_path / "parts")
    assert done.returncode == 2
    assert "paramters" in done.stderr
    assert "`parameters`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["nan", "flexmerge"])
def test_the_output_below_the_home_folder(method, llamas, tmp_path, monkeypatch):
    base, tuned = llamas
    monkeypatch.setenv("HOME", str(tmp_path))
    parameters = {"target_size": 3} if method == "flexmerge" else {}
    content = small.config(method, tuned, base, parameters)
    mergekit_ext.merge(yaml.safe_dump(content), "~/out", QUIET)
    assert any((tmp_path / "out").iterdir())
