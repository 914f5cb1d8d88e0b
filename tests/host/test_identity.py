"""What decides an output: all of it is seen when a merge is gone on with, or ends."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.errors import ConfigError, MergeError, MergeWarning
from mergekit_ext.events import MergeCallback
from mergekit_ext.host.identity import identity, require_unchanged, weights_of
from mergekit_ext.host.inputs import models_of
from tests import models as small

TOKEN = {"kind": "model_token", "token": "w1"}
PLACES = {
    "source": lambda name: {"tokenizer": {"source": name}},
    "old source": lambda name: {"tokenizer_source": name},
    "token": lambda name: {"tokenizer": {"tokens": {"w1": {"source": name}}}},
    "token of a model": lambda name: {
        "tokenizer": {"tokens": {"w1": {"source": {**TOKEN, "model": name}}}}
    },
}


@pytest.fixture
def family(tmp_path):
    return small.family(tmp_path, small.llama, amounts=(0.1, 0.2))


def touch(path):
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def in_a_folder(model):
    """Move the weights of a model into a folder in it, behind an index."""
    (model / "w").mkdir()
    names = list(small.state(model))
    (model / "model.safetensors").rename(model / "w" / "a.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, "w/a.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    return model / "w" / "a.safetensors"


@pytest.mark.parametrize("place", PLACES)
def test_models_of_the_tokenizer_are_inputs(family, tmp_path, place):
    base, tuned = family
    other = tmp_path / "other"
    small.tokenizer(other)
    content = small.config("nan", tuned, base, **PLACES[place](str(other)))
    found = models_of(MergeConfiguration.model_validate(content))
    assert {model.model.path for model in found} == {*map(str, (base, *tuned, other))}
    before = identity("", MergeOptions(), found)
    touch(other / "tokenizer.json")
    after = identity("", MergeOptions(), found)
    assert {key for key in after if after[key] != before[key]} == {f"input {other}"}


def test_the_base_of_a_slice_is_an_input(family):
    base, tuned = family
    sources = [{"model": str(model), "layer_range": [0, 3]} for model in tuned]
    piece = {"sources": sources, "base_model": str(base)}
    config = MergeConfiguration.model_validate({"merge_method": "nan", "slices": [piece]})
    assert {m.model.path for m in models_of(config)} == {str(base), *map(str, tuned)}


def test_a_tokenizer_that_the_output_would_replace(family, tmp_path):
    base, tuned = family
    out = tmp_path / "out"
    small.tokenizer(out)
    for model in (base, *tuned):
        small.tokenizer(model)
    content = small.config("nan", tuned, base, tokenizer={"source": str(out)})
    with pytest.raises(ConfigError, match=r"where the input .*out lies"):
        mergekit_ext.merge(yaml.safe_dump(content), out, MergeOptions(quiet=True))


@pytest.mark.parametrize("name", ["w/a.safetensors", "additional_chat_templates/rag.jinja"])
def test_files_in_folders_of_a_model_are_its(family, name):
    base, tuned = family
    in_a_folder(base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).touch()
    models = models_of(MergeConfiguration.model_validate(small.config("nan", tuned, base)))
    before = identity("", MergeOptions(), models)
    (base / "checkpoint-1").mkdir()
    (base / "checkpoint-1" / "optimizer.pt").touch()
    assert identity("", MergeOptions(), models) == before
    touch(base / name)
    after = identity("", MergeOptions(), models)
    assert {key for key in after if after[key] != before[key]} == {f"input {base}"}


def test_weights_in_a_folder_that_are_written_to_meanwhile(family):
    base, tuned = family
    shard = in_a_folder(base)
    config = MergeConfiguration.model_validate(small.config("nan", tuned, base))
    weights = weights_of(config.referenced_models())
    require_unchanged(weights)
    touch(shard)
    # Whoever wrote the weights has written the index, too.
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MergeError, match=r"w.a\.safetensors: written to while"):
        require_unchanged(weights)


class Stop(MergeCallback):
    def on_tensor_merged(self, event):
        raise KeyboardInterrupt


@pytest.mark.skipif(os.name == "nt", reason="no locks that end with a process")
def test_a_merge_with_another_tokenizer_starts_over(family, tmp_path, capsys):
    base, tuned = family
    other = tmp_path / "other"
    for folder in (base, *tuned, other):
        small.tokenizer(folder)
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    content = yaml.safe_dump(small.config("nan", tuned, base, tokenizer={"source": str(other)}))
    with pytest.raises(KeyboardInterrupt):
        mergekit_ext.merge(content, tmp_path / "merged" / "out", callbacks=[Stop()])
    small.tokenizer(other, [f"w{i}" for i in (0, *range(63, 0, -1))])
    with pytest.warns(MergeWarning, match="bos_token_id 1 in config.json"):
        mergekit_ext.merge(content, tmp_path / "merged" / "out")
    said = f"Starting over: not what was merged before (input {other})"
    assert said in capsys.readouterr().err


def test_the_model_of_a_gpu_decides(monkeypatch):
    """Whose products are rounded otherwise: a merge is not gone on with on another one."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    found = []
    for name in ("H100", "H200"):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        found.append(identity("", MergeOptions(device="cuda:0"), []))
    assert found[0]["options"] != found[1]["options"]
    assert identity("", MergeOptions(device="cpu"), []) == identity("", MergeOptions(), [])
