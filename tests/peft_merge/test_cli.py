"""The command: from YAML to an adapter that PEFT loads, and from mistakes to exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_merge.cli import main
from peft_merge.io.read import load_adapter
from peft_merge.merge import run_config
from tests.peft_merge.models import KINDS, answer, base, reloaded, saved

ROOT = Path(__file__).resolve().parents[2]


def called(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def written(place, document):
    file = place / "merge.yml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.fixture
def place(tmp_path):
    saved(KINDS["plain"], tmp_path / "one", 1)
    saved(KINDS["patterns"], tmp_path / "two", 2)
    written(
        tmp_path,
        {
            "merge_method": "linear",
            "models": [
                {"model": f"{tmp_path}/one", "parameters": {"weight": 0.3}},
                {"model": f"{tmp_path}/two", "parameters": {"weight": 0.9}},
            ],
            "parameters": {"normalize": False},
            "base_model": "someone/base",
        },
    )
    return tmp_path


def test_two_runs_write_the_same_files(place, monkeypatch):
    monkeypatch.chdir(place)
    written = []
    for _ in range(2):
        run_config("merge.yml", "out")
        written.append({path.name: path.read_bytes() for path in Path("out").iterdir()})
        shutil.rmtree("out")
    assert len(written[0]) == 5
    assert written[0] == written[1]


def test_from_yaml_to_logits(place, monkeypatch):
    """The merged adapter answers as the base with both changes added to its weights."""
    monkeypatch.chdir(place)
    done = called("merge.yml", "out", "--jsonl", "events.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "linear: 2 adapters, 6 modules, ranks 4 to 8" in done.stdout
    assert "Merging (linear)" in done.stderr
    assert {path.name for path in (place / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_config.yml",
        "merge_report.json",
    }
    assert (place / "out" / "merge_config.yml").read_text() == (place / "merge.yml").read_text()
    card = (place / "out" / "README.md").read_text()
    assert "# out\n" in card and "### Parameters in effect\n\nmerge_method " in card
    events = [json.loads(line)["event"] for line in (place / "events.jsonl").open()]
    assert (events[0], events[-1]) == ("merge_begin", "merge_end")

    model = base(KINDS["plain"])
    with torch.no_grad():
        for name, weight in (("one", 0.3), ("two", 0.9)):
            adapter = load_adapter(place / name)
            for module in adapter.infos:
                target = model.get_submodule(module).weight
                target += (weight * adapter.load(module).dense()[0]).float()
    expected = answer(KINDS["plain"], model)
    found = answer(KINDS["plain"], reloaded(KINDS["plain"], place / "out"))
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_check_says_what_would_be_written(place):
    done = called("--check", place / "merge.yml")
    assert done.exit_code == 0, done.output
    for line in (
        "adapter  kind  rank    modules  whole tensors  dtype",
        "one      LoRA  4       4        0              float32",
        "two      LoRA  2 to 4  6        0              float32",
        "Modules: 6, 4 of them in all adapters",
        "Output:  at most rank 8 in every module, 6.15kB of float32\n",
    ):
        assert line in done.output
    assert sorted(path.name for path in place.iterdir()) == ["merge.yml", "one", "two"]


def test_the_size_of_a_check_is_that_of_the_merge(place):
    previewed = called("--check", "--rank", 2, place / "merge.yml").output
    assert "Output:  rank 2 in every module, 1.54kB of float32" in previewed
    assert called(place / "merge.yml", place / "out", "--rank", 2, "-q").exit_code == 0
    tensors = load_file(place / "out" / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 1536
    assert yaml.safe_load((place / "out" / "merge_config.yml").read_text())["rank"] == 2


def test_the_rank_of_a_check_is_that_of_the_configuration(tmp_path):
    source = saved(KINDS["convolutions"], tmp_path / "one", seed=1)
    (tmp_path / "merge.yml").write_text(f"merge_method: linear\nmodels:\n- model: {source}\n")
    previewed = called("--check", tmp_path / "merge.yml").output
    assert called(tmp_path / "merge.yml", tmp_path / "out", "-q").exit_code == 0
    r = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    assert f"rank {r} in every module" in previewed


def test_ranks_of_the_command_line(place):
    for text, said in (("lossless", "No problems"), ("energy=0.9", "No problems")):
        assert said in called("--check", place / "merge.yml", "--rank", text).output
    for text in ("0", "half", "energy=2", "energy=x"):
        done = called("--check", place / "merge.yml", "--rank", text)
        assert done.exit_code == 2
        assert "rank: found" in done.stderr


def test_mistakes_are_one_message_and_exit_code_2(place):
    written(place, {"merge_method": "tise", "models": [{"model": "./nowhere"}], "sede": 1})
    done = called(place / "merge.yml", place / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"3 problems with {place / 'merge.yml'}; nothing was done:" in done.stderr
    assert not (place / "out").exists()


def test_other_mistakes(place):
    assert called(place / "merge.yml").exit_code == 2  # no OUT
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    done = called(place / "merge.yml", place / "full")
    assert (done.exit_code, "which is not empty" in done.stderr) == (2, True)
    done = called(place / "missing.yml", place / "out")
    assert (done.exit_code, "cannot be read" in done.stderr) == (2, True)
    done = called(place / "merge.yml", place / "out", "--jsonl", place / "no" / "events")
    assert (done.exit_code, "--jsonl" in done.stderr) == (2, True)
    done = called(place / "merge.yml", place / "out", "--device", "abacus")
    assert (done.exit_code, "device: found 'abacus'" in done.stderr) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(place):
    done = called(place / "merge.yml", place / "out", "--device", "cuda")
    assert done.exit_code == 2
    assert "device: found 'cuda'; expected a device that can be used here" in done.stderr
    assert "AssertionError" not in done.stderr


def test_values_that_stop_a_merge_are_no_traceback(place):
    file = place / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    done = called(place / "merge.yml", place / "out", "-q")
    assert done.exit_code == 2
    assert "of model one: found 1 non-finite value" in done.stderr
    assert not (place / "out").exists()


def test_pickles_are_read_when_asked_for(place):
    file = place / "one" / "adapter_model.safetensors"
    torch.save(load_file(file), place / "one" / "adapter_model.bin")
    file.unlink()
    done = called(place / "merge.yml", place / "out", "-q")
    assert done.exit_code == 2
    done = called(place / "merge.yml", place / "out", "-q", "--allow-pickle")
    assert done.exit_code == 0, done.stderr


def test_truncation_is_reported(place):
    done = called(place / "merge.yml", place / "out", "--rank", 1)
    assert "Cutting off the rank changed the merged weights by" in done.stdout


def test_quiet(place):
    done = called(place / "merge.yml", place / "out", "--quiet")
    assert (done.exit_code, done.output) == (0, "")


@pytest.mark.filterwarnings("always:.*came out uniform")
def test_warnings_are_one_line(place):
    written(
        place,
        {
            "merge_method": "nan",
            "models": [{"model": f"{place}/one"}, {"model": f"{place}/one", "name": "again"}],
        },
    )
    done = called(place / "merge.yml", place / "out", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith("Warning: nan: the coefficients came out uniform")
    assert done.stderr.count("\n") == 1


def test_help_is_light():
    code = (
        "import sys, click.testing, peft_merge.cli; "
        "done = click.testing.CliRunner().invoke(peft_merge.cli.main, ['--help']); "
        "assert 'CONFIG' in done.output; "
        "heavy = {'torch', 'peft', 'transformers', 'mergekit', 'yaml'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_merge_loads_neither_peft_nor_transformers(place):
    code = (
        "import sys, peft_merge; peft_merge.run_config('merge.yml', 'out'); "
        "heavy = {'peft', 'transformers', 'mergekit'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=place, env=environment
    )
    assert done.returncode == 0, done.stderr
