from __future__ import annotations

import pytest

from mergekit_ext.host.staging import shards, staged


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_output_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "model.safetensors").write_text("new")
        assert folder.name == "out"
        assert not out.exists()
    assert names(out) == ["model.safetensors"]
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_failure_leaves_an_earlier_output_as_it_was(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    with pytest.raises(ValueError), staged(out) as folder:
        (folder / "model.safetensors").write_text("half")
        raise ValueError
    assert (out / "model.safetensors").read_text() == "old"


def test_replaces_the_weights_of_an_earlier_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "notes.txt",
    )
    for name in old:
        (out / name).write_text("old")
    with staged(out) as folder:
        (folder / "model.safetensors").write_text("new")
    assert names(out) == ["model.safetensors", "notes.txt"]
    assert [path.name for path in shards(out)] == ["model.safetensors"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert names(tmp_path / "out") == ["config.json"]
