"""Where adapters come from: folders, the Hub; several at once."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ext.errors import ConfigError
from peft_merge.io.read import load_adapter
from peft_merge.merge import merge_adapters
from tests.peft_merge.edit import change_config


def test_names(adapter_folder, monkeypatch):
    folder = adapter_folder("plain", seed=7)
    assert load_adapter(folder).name == "plain-7"
    assert load_adapter(f"{folder}/").name == "plain-7"
    assert load_adapter(folder / ".." / folder.name).name == "plain-7"
    assert load_adapter(folder, name="mine").name == "mine"
    monkeypatch.chdir(folder)
    assert load_adapter(".").name == "plain-7"
    for name in ("", "..", "a/b", "a\\b", "a\nb"):
        with pytest.raises(ConfigError, match="without slashes"):
            load_adapter(folder, name=name)


def test_problems_of_all_adapters_come_at_once(adapter_folder, tmp_path):
    good = adapter_folder("plain", seed=1)
    bad = change_config(adapter_folder("plain", seed=2), r=0)
    with pytest.raises(ConfigError) as raised:
        merge_adapters([good, bad, tmp_path / "absent", good])
    text = str(raised.value)
    assert len(raised.value.problems) == 3
    assert "absent" in text and "called 'plain-1'" in text and ": r:" in text


def test_an_at_sign_in_the_path_of_a_folder(adapter_folder, tmp_path, monkeypatch):
    adapter_folder("plain", seed=7).rename(tmp_path / "a@b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert merge_adapters(["~/a@b"]).report["adapters"][0]["name"] == "a@b"
    with pytest.raises(ConfigError, match="no such folder"):
        merge_adapters(["x" * 5000 + "@b"])


def test_a_folder_of_adapters_or_a_full_model_is_distinguished_from_one(adapter_folder, tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match=r"Merge full models with `mergekit-yaml`"):
        load_adapter(tmp_path)
    folder = adapter_folder("plain", seed=7)
    with pytest.raises(ConfigError, match=r"folders in it: .*plain-7"):
        load_adapter(folder.parent)


def test_a_name_on_the_hub_is_downloaded_without_the_rest(adapter_folder, monkeypatch):
    folder = adapter_folder("plain")
    calls: list[tuple[Any, ...]] = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    adapter = load_adapter("someone/an-adapter", revision="v1")
    assert adapter.name == "an-adapter"
    files = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert calls == [("someone/an-adapter", "v1", files)]
    load_adapter("someone/an-adapter", allow_pickle=True)
    assert "adapter_model.bin" in calls[1][2]


def test_what_cannot_be_downloaded_is_one_problem():
    with pytest.raises(ConfigError, match="no download from the Hub"):
        load_adapter("someone/that-is-not-cached")


@pytest.mark.parametrize(
    "source",
    ["./here", "/nowhere/at/all", "a/b/c", "~/none", "", "x" * 300, "~nobody-here/x", "a\0b"],
)
def test_a_path_is_not_looked_for_on_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def download(*args, **kwargs):
        raise OSError("asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError):
        load_adapter(source)


@pytest.mark.parametrize("item", [3, None, b"folder", ["folder"]])
def test_what_is_no_source_is_named_by_its_number(item, adapter_folder):
    folder = adapter_folder("plain")
    for adapters in ([folder, item], {"a": folder, "b": item}):
        with pytest.raises(ConfigError, match=r"adapters\[1\].model: found .* an adapter's folder"):
            merge_adapters(adapters)
