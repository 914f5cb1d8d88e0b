"""Models that cannot be read, or whose classes are not one, with place and remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file

from mergekit_ext.io.headers import read_folder
from tests.host.small import LINEAR, at, entries, llama, run, the, tuned


def test_paths_that_lead_nowhere(models: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    file = models / "a" / "model.safetensors"
    paths = [models / "large_vocap", empty, adapter, file.with_suffix(".json")]
    (tmp_path / "plain").write_text("")
    paths[3] = tmp_path / "plain"
    report = run({**LINEAR, "models": [{"model": str(path)} for path in paths]})
    assert str(models / "large_vocab") in at(report, "models[0].model").remedy
    found = [problem.found for problem in report.problems if problem.where == "models[1].model"]
    assert any("no weights" in text for text in found)
    assert any("no config.json" in text for text in found)
    assert "<base model>+" in at(report, "models[2].model").remedy
    assert "config.json" in at(report, "models[3].model").remedy


def test_home_is_not_expanded() -> None:
    report = run({**LINEAR, "models": [{"model": "~/model"}]})
    assert "does not expand" in the(report).remedy


@pytest.mark.parametrize(
    ("fields", "found", "remedy"),
    [
        ({"model_type": "no_such_type"}, "no_such_type", "--trust-remote-code"),
        ({"architectures": None}, "`architectures`", "override_architecture"),
    ],
)
def test_configurations_that_cannot_be_used(fields, found, remedy, copy) -> None:
    report = run({**LINEAR, "models": [{"model": str(copy("a", **fields))}]})
    assert found in the(report).found and remedy in the(report).remedy


def test_pickles_are_refused_or_checked_and_noted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pickle"
    folder.mkdir()
    (folder / "config.json").write_bytes((models / "a" / "config.json").read_bytes())
    tensors = load_file(models / "a" / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    document = {**LINEAR, "models": entries(models, folder, "b")}
    refused = the(run(document))
    assert "pytorch_model.bin with a pickle" in refused.found
    assert "MERGEKIT_EXT_ALLOW_PICKLE=1" in refused.remedy
    monkeypatch.setenv("MERGEKIT_EXT_ALLOW_PICKLE", "1")
    report = run(document)
    assert report.problems == () and report.estimate is not None
    assert any("only tensors" in note for note in report.notes)
    torch.save({**tensors, "lm_head.weight": torch.zeros(3, 3)}, folder / "pytorch_model.bin")
    assert "[3, 3]" in the(run(document)).found
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert "torch.load refuses" in the(run(document)).found


def test_architectures_that_differ(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "bert_a")}
    problem = the(run(document))
    assert "BertForSequenceClassification" in problem.found
    assert "--allow-crimes" in problem.remedy
    assert "nothing in" in " ".join(p.found for p in run(document, allow_crimes=True).problems)


@pytest.mark.parametrize("kind", ["t5_old", "vit_a"])
def test_what_no_table_fits_is_planned_by_the_names_in_the_files(models: Path, kind: str) -> None:
    report = run({**LINEAR, "models": entries(models, kind)})
    assert report.problems == () and report.estimate is not None
    assert report.estimate.tensors == len(read_folder(models / kind))
    assert any("by the names in the files" in note for note in report.notes)


def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    document = {**LINEAR, "models": [{"model": "someone/model"}]}
    assert "HF_HUB_OFFLINE" in the(run(document)).remedy
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((models / "a" / name).read_bytes())
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("1234")
    report = run(document, transformers_cache=str(tmp_path))
    assert f"Write the path of the cached copy, {snapshot}." in [
        problem.remedy for problem in report.problems
    ]


@pytest.mark.only_checked("no such model on the Hub")
def test_hub_name_online_reads_metadata_only(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    headers = read_folder(models / "large_vocab")
    tensors = {
        name: SimpleNamespace(dtype=h.dtype, shape=list(h.shape), data_offsets=(0, h.nbytes))
        for name, h in headers.items()
    }
    metadata = SimpleNamespace(
        weight_map=dict.fromkeys(tensors, "model.safetensors"),
        files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)},
    )
    config = transformers.AutoConfig.from_pretrained(models / "large_vocab")
    read = transformers.AutoConfig.from_pretrained

    def from_pretrained(path: str, **options: Any) -> Any:
        return config if path == "someone/model" else read(path, **options)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: metadata)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    document = {**LINEAR, "models": [{"model": "someone/model"}, *entries(models, "a")]}
    assert "[72, 16] in someone/model" in the(run(document)).found
    # Which tokens it has is not known: the largest vocabulary counts.
    built = run({**document, "tokenizer_source": "union"})
    assert built.problems == () and built.estimate
    large = sum(math.prod(header.shape) for header in headers.values())
    assert built.estimate.parameters == large
    assert built.estimate.need.parts["the result"] == 4 * 16 * 72
    monkeypatch.setattr(config, "architectures", None)
    tensors["x.qweight"] = tensors["lm_head.weight"]
    metadata.weight_map["x.qweight"] = "model.safetensors"
    found = [problem.found for problem in run(document).problems]
    assert len(found) == 2 and "`architectures`" in found[0] and "codes" in found[1]

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("404 Client Error")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", gone)
    assert "404 Client Error" in the(run(document)).found


@pytest.mark.only_checked("an empty adapter")
def test_base_with_adapter_by_mergekits_own_way(models, copy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MERGEKIT_EXT_ADAPTERS", "0")
    base = copy("a")
    reference = f"{base}+{tmp_path / 'adapter'}"
    document = {**LINEAR, "models": [{"model": reference}, *entries(models, "b")]}
    texts = [str(problem) for problem in run(document).problems]
    assert any("--lora-merge-cache" in text for text in texts)
    assert any("adapter, which does not exist" in text for text in texts)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    cache = tmp_path / "cache"
    assert "no adapter_model.safetensors" in the(run(document, lora_merge_cache=str(cache))).found
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert run(document, lora_merge_cache=str(cache)).problems == ()
    # An interrupted run leaves an empty folder, which mergekit takes for the merged model.
    model = MergeConfiguration.model_validate(document).models[0].model
    merged = cache / f"{model.model._unique_id()}_{model.lora._unique_id()}"
    merged.mkdir(parents=True)
    assert the(run(document, lora_merge_cache=str(cache))).remedy.startswith("Delete ")
    (merged / "model.safetensors").write_bytes((models / "b" / "model.safetensors").read_bytes())
    (base / "model.safetensors").write_bytes(b"which are not read")
    assert run(document, lora_merge_cache=str(cache)).problems == ()


def test_truncated_model_is_named(models: Path, copy: Callable[..., Path]) -> None:
    folder = copy("a", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    report = run({**LINEAR, "models": entries(models, folder, "b")})
    assert f"{file} with no safetensors file" in the(report).found
    assert the(report).remedy == "Copy or download the file again."


def test_slices_of_an_architecture_with_several_modules(models: Path) -> None:
    sources = [{"model": str(models / "t5_a"), "layer_range": [0, 1]}]
    problem = the(run({**LINEAR, "slices": [{"sources": sources}]}))
    assert problem.where == "the merge's plan" and "must use modules:" in problem.found


def _with_vocabulary(folder: Path, vocabulary: Any, added: Sequence[Mapping[str, Any]] = ()) -> str:
    tuned(llama(), seed=len(str(folder))).save_pretrained(folder)
    content = {"model": {"vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "templates", "said"),
    [
        ({}, ("t", "t", ""), ""),
        ({}, ("t", "t", "u"), r"that of .*base, and models\[1\].model another"),
        ({}, ("", "t", "t"), r"that of .*base \(none\), and models\[0\].model, models\[1\].model"),
        ({"base_model": None, "merge_method": "linear"}, ("t", "u", "u"), ""),
        ({"chat_template": "auto"}, ("", "t", "u"), ""),
        ({"merge_method": "flexmerge"}, ("", "t", "u"), ""),
        ({"base_model": "some/base"}, ("", "t", "u"), ""),  # whose template is not known
    ],
)
@pytest.mark.parametrize("apart", [True, False])
def test_other_chat_templates_are_named(
    tmp_path: Path, changes: Any, templates: Sequence[str], said: str, apart: bool
) -> None:
    folders = [Path(_with_vocabulary(tmp_path / n, {"a": 0})) for n in ("base", "one", "two")]
    for folder, template in zip(folders, templates, strict=True):
        kept = {} if apart else {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        if apart and template:
            (folder / "chat_template.jinja").write_text(f"{template}\n")
    base, *models = map(str, folders)
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    shared = {"target_size": 1.5} if changes.get("merge_method") == "flexmerge" else {}
    document = {"merge_method": "nan", "base_model": base, "models": entries, "parameters": shared}
    report = run({**document, **changes})
    found = [text for text in report.warnings if text.startswith("chat_template: ")]
    assert len(found) == bool(said) and (not said or re.search(said, found[0])), report
    assert not run({**document, **changes}, copy_tokenizer=False).warnings


@pytest.mark.parametrize("method", ["nan", "task_arithmetic", "flexmerge"])
@pytest.mark.parametrize(
    ("other", "added", "moved"),
    [
        ({"a": 1, "b": 0, "c": 2}, [], "(2: "),
        ([["b", 0.0], ["a", -1.0]], [], "(2: "),
        ({"a": 0, "b": 1}, [{"content": "c", "id": 9}], "(1: "),
        ({"a": 0, "b": 1, "d": 3}, [], None),
        (None, [{"id": "odd"}, 3], None),
        ([[], [["x"], 1], 7], [], None),
    ],
)
def test_tokens_with_other_ids_are_named(
    tmp_path: Path, method: str, other: Any, added: Any, moved: str | None
) -> None:
    base = _with_vocabulary(tmp_path / "base", {"a": 0, "b": 1, "c": 2})
    one = _with_vocabulary(tmp_path / "one", {"a": 0, "b": 1, "c": 2})
    two = _with_vocabulary(tmp_path / "two", other, added)
    shared = {"target_size": 1.5} if method == "flexmerge" else {}
    models = [{"model": m, "parameters": {"weight": 1.0}} for m in (one, two)]
    document = {"merge_method": method, "base_model": base, "models": models}
    report = run({**document, "parameters": shared}, copy_tokenizer=False)
    found = [text for text in report.warnings if "other ids" in text]
    assert len(found) == bool(moved) and not report.problems
    assert not moved or (moved in found[0] and found[0].startswith("models[1].model: "))
