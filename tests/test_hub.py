"""Outputs on the Hub, through huggingface_hub and a stand-in that speaks its protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import LlamaForCausalLM, ViTForImageClassification

import mergekit_ext
from mergekit_ext import flexmerge
from mergekit_ext.errors import CheckpointError, ConfigError, UploadError
from mergekit_ext.host.interface import MergeResult
from mergekit_ext.io.class_model import without_bars
from mergekit_ext.io.hub import upload_problems
from peft_merge import load_adapter, run_config
from tests.flexmerge.handmade import models, vit, write
from tests.hub import WRITES, Hub, Repository, serving
from tests.models import bert, command_here, config, family, llama, write_yaml
from tests.peft_merge.models import KINDS, saved

NAME, TASKS = "someone/merged", ["a", "b", "c", "d"]
_DENSE = [(["a", "b"], "dense"), (["c"], "dense"), (["d"], "dense")]
_MASKED = [(["a", "b", "c"], "masked"), (["d"], "dense")]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, in place of the Hub; with a token and an empty cache."""
    with serving() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        huggingface_hub.close_session()
        huggingface_hub.utils.disable_progress_bars()
        yield server
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    """A FlexMerge, of which the task `d` alone is an ordinary model."""
    folder = tmp_path_factory.mktemp("flexmerge")
    base, tuned = models(folder, vit, TASKS)
    groups = {True: _MASKED, False: _DENSE}
    write(folder / "out", base, tuned, lambda b: groups["attention" in b], files_per_set=1)
    return MergeResult(folder / "out")


def same(one: Any, other: Any) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


def test_a_flexmerge_is_sent_once_and_loads(hub: Hub, result: MergeResult) -> None:
    assert result.push_to_hub(NAME) == result.url == f"{hub.url}/{NAME}"
    assert hub.repositories[NAME].private
    shards = [file.path for file in flexmerge.read_manifest(result.path).files]
    assert sorted(hub.sent.values()) == [1] * len(shards)  # and no link to one
    loaded, local = flexmerge.load(NAME, verify=True), flexmerge.load(result.path)
    assert loaded.keys() == local.keys()
    assert all(same(loaded[task], local[task]) for task in local)


@pytest.mark.parametrize("task", ["a", "d"])
def test_one_task_needs_its_own_files_alone(hub: Hub, result: MergeResult, task: str) -> None:
    result.push_to_hub(NAME)
    with pytest.raises(CheckpointError, match="one of a, b, c, d"):
        flexmerge.load(NAME, "e")
    local = flexmerge.load(result.path, task)
    assert same(flexmerge.load(NAME, task, revision="main"), local)
    manifest = flexmerge.read_manifest(result.path)
    others = {file.path for file in manifest.files if task not in file.tasks}
    assert others and not others & hub.got.keys()
    assert {path.partition("/")[0] for path in hub.got} == {"flexmerge.json", "shards", task}
    if task == "d":
        assert same(ViTForImageClassification.from_pretrained(NAME, subfolder=task), local)


def test_what_is_no_flexmerge_is_one_error_and_not_downloaded(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no download from the Hub"):
        flexmerge.load("someone/else")
    hub.repositories[NAME] = Repository(private=True, files={"model.safetensors": b"large"})
    with pytest.raises(CheckpointError, match="the manifest of a FlexMerge checkpoint"):
        flexmerge.load(NAME)
    assert not hub.got


def test_a_stopped_upload_goes_on_and_only_weights_give_way(hub: Hub, result: MergeResult) -> None:
    before = {"model-00001-of-00009.safetensors": b"old", "LICENSE": b"mine"}
    before["adapter_config.json"] = b"{}"
    hub.repositories[NAME] = Repository(private=True, files=dict(before))
    hub.uploads = 2
    with pytest.raises(UploadError, match=f"hf upload {NAME} FOLDER"):
        result.push_to_hub(NAME)
    assert hub.repositories[NAME].files == before and len(hub.sent) == 2
    hub.uploads = None
    result.push_to_hub(NAME)
    assert set(hub.sent.values()) == {1}
    after = hub.repositories[NAME].files
    assert "flexmerge.json" in after and before.items() & after.items() == {("LICENSE", b"mine")}


@pytest.mark.parametrize(
    ("name", "user", "private", "wrong"),
    [
        ("a b", WRITES, True, "no name for one"),
        ("other/merged", WRITES, True, "one of someone, team"),
        (NAME, None, True, "no access"),
        (NAME, {**WRITES, "role": "read"}, True, "a token that only reads"),
        ("team/open", WRITES, True, "a public one; expected a private one"),
        (None, WRITES, False, "`--push-to-hub NAME` beside it"),
    ],
)
def test_what_keeps_a_folder_from_being_uploaded(
    hub: Hub, name: str | None, user: Any, private: bool, wrong: str
) -> None:
    hub.user = user
    hub.repositories["team/open"] = Repository(private=False)
    (problem,) = upload_problems(name, private)
    assert wrong in str(problem)


def test_it_is_said_before_the_merge_with_all_that_is_wrong(hub: Hub, tmp_path: Path) -> None:
    """And nothing is done: no folder, and no repository."""
    merged = config("linear", [tmp_path / "none"], parameters={"weigth": 1})
    with pytest.raises(ConfigError, match=r"(?s)4 problems.*none.*weigth.*no name for one"):
        mergekit_ext.merge(merged, tmp_path / "out", push_to_hub="a b")
    document = {"merge_method": "linear", "models": [{"model": str(tmp_path / "none")}]}
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*one of someone, team.*none"):
        run_config(document, tmp_path / "out", push_to_hub="other/merged")
    assert not [*tmp_path.iterdir(), *hub.repositories]


def test_without_a_network_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"OfflineModeIsEnabled.*Unset HF_HUB_OFFLINE"):
        MergeResult(Path("out")).push_to_hub(NAME)


def test_what_helps_depends_on_whether_the_hub_has_answered(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = {"merge_method": "linear", "models": [{"model": "a/b", "parameters": {"weight": 1}}]}

    def remedies() -> set[str]:
        found = [*mergekit_ext.check(merge).problems, *upload_problems(NAME, True)]
        with pytest.raises(ConfigError) as raised:
            load_adapter("a/b")
        return {problem.remedy for problem in (*found, *raised.value.problems)}

    hub.user = None
    assert len(found := remedies()) == 2 and all("`hf auth login`" in remedy for remedy in found)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert remedies() == {"Check the name and the network."}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert all(remedy.startswith("Unset ") for remedy in remedies())


def test_commands_upload_what_they_write(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public model, whose card the Hub takes; what the configuration says, and no hidden file."""
    base, tuned = family(tmp_path, bert, amounts=(0.01, 0.02))
    file = write_yaml(tmp_path / "merge.yml", config("nan", tuned, base))
    out = tmp_path / "out"
    given = ("--push-to-hub", "team/merged", "--public", "--quiet")
    huggingface_hub.utils.enable_progress_bars()
    monkeypatch.setenv("TQDM_POSITION", "-1")
    done = command_here("mergekit-ext", "merge", file, out, *given)
    assert (done.stdout, done.stderr) == (f"Uploaded: {hub.url}/team/merged\n", "")
    stored = hub.repositories["team/merged"]
    assert not stored.private
    assert stored.files == {path.name: path.read_bytes() for path in out.iterdir()}
    ModelCard.load(out / "README.md").validate()


def test_adapters_of_a_decomposition_name_the_repository(hub: Hub, tmp_path: Path) -> None:
    """Also after a move; and load from the Hub as docs/hub.md says. Local files stay."""
    base, tuned = family(tmp_path, llama, amounts=(0.01, 0.02))
    document = config("decompose", tuned, base, {"rank": 2})
    (tmp_path / "away").mkdir()
    moved = mergekit_ext.decompose(document, tmp_path / "out").path.rename(tmp_path / "away/out")
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    MergeResult(moved).push_to_hub(NAME)
    assert before == {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    stored = hub.repositories[NAME].files
    assert {*stored} == {path.relative_to(moved).as_posix() for path in before}
    for task in ("tuned0", "tuned1"):
        stated = json.loads(stored[f"{task}/adapter_config.json"])
        local = json.loads((moved / task / "adapter_config.json").read_text())
        assert stated.pop("base_model_name_or_path") == NAME
        assert local.pop("base_model_name_or_path") == str(tmp_path / "out" / "base")
        assert stated == local
        there = LlamaForCausalLM.from_pretrained(NAME, subfolder="base")
        here = LlamaForCausalLM.from_pretrained(moved / "base")
        assert same(
            PeftModel.from_pretrained(there, NAME, subfolder=task),
            PeftModel.from_pretrained(here, moved / task),
        )


@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize("transfers", [True, False])
def test_bars_are_shown_again_as_they_were(loads: bool, transfers: bool) -> None:
    """transformers switches the Hub's with its own."""
    bars, hub = transformers.logging, huggingface_hub.utils
    before = bars.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()

    def switch(loads: bool, transfers: bool) -> None:
        (bars.enable_progress_bar if loads else bars.disable_progress_bar)()
        (hub.enable_progress_bars if transfers else hub.disable_progress_bars)()

    try:
        switch(loads, transfers)
        with without_bars():
            assert not bars.is_progress_bar_enabled() and hub.are_progress_bars_disabled()
        assert bars.is_progress_bar_enabled() == loads
        assert hub.are_progress_bars_disabled() != transfers
    finally:
        switch(*before)


def test_adapters_are_uploaded_under_their_repository_s_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--quiet` also huggingface_hub shows no bar."""
    folders = [saved(KINDS["plain"], tmp_path / f"plain-{seed}", seed) for seed in (1, 2)]
    document = {"merge_method": "linear", "models": [{"model": str(f)} for f in folders]}
    file = write_yaml(tmp_path / "merge.yml", document)
    huggingface_hub.utils.enable_progress_bars()
    monkeypatch.setenv("TQDM_POSITION", "-1")  # not on terminals alone
    done = command_here("peft-merge", file, tmp_path / "out", "--push-to-hub", "merged", "--quiet")
    assert (done.stdout, done.stderr) == (f"Uploaded: {hub.url}/{NAME}\n", "")
    written, found = load_adapter(tmp_path / "out"), load_adapter(NAME)
    for module in written.infos:
        assert torch.equal(written.load(module).b, found.load(module).b)
    card = hub.repositories[NAME].files["README.md"].decode()
    assert f'from_pretrained(base_model, "{NAME}")' in card
    ModelCard(card).validate()
