"""Merging checkpoints from where a trainer saved them, and saving what comes out."""

from __future__ import annotations

import copy
import os
import re
import shutil

import pytest
import torch

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError
from tests.attacks.weights import joined
from tests.callbacks.small import llama, mean, same, spread, train


def test_a_merged_transformers_model_is_saved_with_its_configuration(tmp_path):
    from transformers import LlamaForCausalLM

    model = llama(tied=True)
    callback = MergeCheckpoints("linear", keep=2)
    train(model, [callback], steps=3)
    merged = callback.merge()
    merged.save(tmp_path / "merged", model)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in merged.weights.tensors.items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "merged"))):
        merged.save(tmp_path / "merged")


def test_saved_checkpoints_are_merged_from_where_they_are(tmp_path):
    model = llama()
    callback = MergeCheckpoints("linear", on="save", keep=2, load=True)
    states = []
    for step in (1, 2, 3):
        spread(model, 0.1, seed=step)
        model.save_pretrained(tmp_path / f"c{step}")
        states.append(copy.deepcopy(model.state_dict()))
        callback.on_step_end(step, model)
        callback.on_save(step, tmp_path / f"c{step}")
    callback.on_train_end(3, model)
    assert callback.result.steps == (2, 3)
    expected = mean(states[1:], states[0])
    same(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)
    callback.result.save(tmp_path / "merged")
    assert (tmp_path / "merged/config.json").is_file() and (tmp_path / "c1").is_dir()
    shutil.rmtree(tmp_path / "c2")
    with pytest.raises(ConfigError, match=r"c2: found no such folder.*save_total_limit"):
        callback.merge()
    callback.on_save(4, tmp_path / "c1")  # that was the oldest, which goes anyway
    shutil.rmtree(tmp_path / "c1")
    shutil.rmtree(tmp_path / "c3")
    model.save_pretrained(tmp_path / "c5")
    with pytest.raises(ConfigError, match=r"c1: found no such folder.*save_total_limit"):
        callback.on_save(5, tmp_path / "c5")  # and not when training ends
    (tmp_path / "c5/model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"c5: found files that cannot be read"):
        callback.on_save(5, tmp_path / "c5")


def test_models_that_are_saved_under_other_names_are_loaded_too(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    callback = MergeCheckpoints("linear", on="save", load=True, evaluate=lambda m, t: 0.0)
    for step in (1, 2):
        spread(model, 0.1, seed=step)
        model.save_pretrained(tmp_path / f"c{step}")
        callback.on_save(step, tmp_path / f"c{step}")
    own, merged = model.state_dict().keys(), callback.merge().weights.tensors.keys()
    assert merged - own, "this model is no example any more"
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    spread(model, -0.1, seed=2)
    for name, tensor in model.state_dict().items():
        expected[name] = (expected[name] + tensor) / 2
    callback.on_train_end(2, model)
    same(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "c2/chat_template.jinja").write_text("{{ x }}")
    callback.result.save(tmp_path / "merged", model)
    assert (tmp_path / "merged/chat_template.jinja").is_file()
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    same(dict(loaded.state_dict()), expected, rtol=1e-5, atol=1e-6)
    live = MergeCheckpoints("linear")
    live.on_step_end(1, model)
    with pytest.raises(ConfigError, match="no weights for"):
        live.merge().save(tmp_path / "other", llama())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_pipe_is_no_checkpoint(name, tmp_path):
    """Opening one would wait for its other end."""
    (tmp_path / "adapter_config.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="not a regular file"):
        MergeCheckpoints("linear", on="save").on_save(1, tmp_path)


def test_dtypes_that_cannot_be_converted_are_no_checkpoint(tmp_path):
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    (tmp_path / "model.safetensors").write_bytes(joined({"w": entry}, bytes(1)))
    with pytest.raises(ConfigError, match="F4 in w"):
        MergeCheckpoints("linear", on="save").on_save(1, tmp_path)
