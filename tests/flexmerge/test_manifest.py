"""The manifest: what is read comes back, and every rule of the specification is held."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.errors import CheckpointError
from mergekit_ext.flexmerge.manifest import (
    Manifest,
    colliding_names,
    task_name_problem,
)
from mergekit_ext.io.schema import parse

DIGEST = "0123456789abcdef" * 4


def sound() -> dict[str, Any]:
    """A manifest of three tasks: one dense group, one masked, and heads."""
    return {
        "format": "flexmerge",
        "version": 1,
        "generator": "a test",
        "method": {"algorithm": "emr", "parameters": {"deep": [[1.5, None]]}},
        "base_model": "org/base",
        "size": {"models": 2.25, "bytes": 1000, "unit_bytes": 400, "private_bytes": 100},
        "tasks": [
            {"name": "a", "model": "org/a", "ordinary": True},
            {"name": "b", "model": "org/b", "ordinary": False},
            {"name": "c", "model": "org/c", "ordinary": False},
        ],
        "files": [
            {
                "path": f"shards/{name}.safetensors",
                "kind": kind,
                "tasks": tasks,
                "bytes": 10,
                "sha256": DIGEST,
            }
            for name, kind, tasks in [
                ("dense-00001", "dense", ["a"]),
                ("base-00001", "base", []),
                ("unified-00001", "unified", ["b", "c"]),
                ("masks-00001", "masks", ["b"]),
            ]
        ],
        "blocks": [
            {
                "name": "layer 0",
                "kind": "attention",
                "tensors": [{"name": "q", "shape": [2, 3]}, {"name": "scalar", "shape": []}],
                "groups": [
                    {"tasks": ["a"], "kind": "dense", "similarity": None},
                    {
                        "tasks": ["b", "c"],
                        "kind": "masked",
                        "similarity": 0.25,
                        "rescale": {"b": 1.5, "c": 1},
                    },
                ],
            }
        ],
        "private": [{"task": "a", "tensors": [{"name": "head", "shape": [4, 3]}]}],
        "task_files": {"a/config.json": DIGEST},
    }


def read(content: Any) -> Manifest:
    text = content if isinstance(content, str) else json.dumps(content)
    return parse(Manifest, text, "there/flexmerge.json")


def refusal(content: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    assert str(caught.value).splitlines()[0].endswith("nothing of it was used:")
    assert "there/flexmerge.json" in str(caught.value)
    return str(caught.value)


def test_writes_what_it_reads() -> None:
    manifest = read(sound())
    assert json.loads(manifest.to_json()) == sound()
    assert read(manifest.to_json()) == manifest
    assert manifest.size.models == 2.25
    assert manifest.blocks[0].groups[0].rescale == {}


def test_unknown_keys_are_ignored() -> None:
    content = sound()
    for place in (content, content["size"], content["tasks"][0], content["files"][0]):
        place["of tomorrow"] = {"x": 1}
    content["blocks"][0]["groups"][0]["of tomorrow"] = 1
    manifest = read(content)
    assert manifest == read(sound())


def test_not_finite_is_not_written() -> None:
    content = sound()
    manifest = read(content)
    broken = manifest.model_copy(update={"method": {"deep": float("nan")}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def act(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return act


GROUPS = ("blocks", 0, "groups")
WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (change("format", to="gguf"), "format: found 'gguf'"),
    "digest of a task's file": (
        change("task_files", "a/config.json", to="0"),
        "task_files.a/config.json: found '0'; expected",
    ),
    "method": (change("method", to=[]), "method: found []; expected a mapping"),
    "name of a task is a path": (change("tasks", 0, "name", to=".."), "tasks[0].name: found '..'"),
    "name of a task is a number": (change("tasks", 0, "name", to=3), "tasks[0].name: found 3"),
    "no tasks": (change("tasks", to=[]), "tasks: found []; expected"),
    "bool for a number": (change("size", "bytes", to=True), "size.bytes: found True"),
    "more than 64 bits": (change("files", 0, "bytes", to=2**63), "files[0].bytes: found 92"),
    "fraction of a byte": (change("files", 0, "bytes", to=1.0), "files[0].bytes: found 1.0"),
    "negative dimension": (
        change("blocks", 0, "tensors", 0, "shape", to=[2, -3]),
        "blocks[0].tensors[0].shape[1]: found -3",
    ),
    "absolute path": (change("files", 0, "path", to="/etc/passwd"), "files[0].path: found"),
    "path that leaves": (change("files", 0, "path", to="shards/../x"), "files[0].path: found"),
    "path that is hidden": (change("files", 0, "path", to="shards/.x"), "files[0].path: found"),
    "path of Windows": (change("files", 0, "path", to="shards/..\\x"), "files[0].path: found"),
    "path with NUL": (change("files", 0, "path", to="shards/x\0y"), "files[0].path: found"),
    "kind of a file": (change("files", 0, "kind", to="sparse"), "files[0].kind: found 'sparse'"),
    "kind of a group": (change(*GROUPS, 0, "kind", to="lora"), "groups[0].kind: found 'lora'"),
    "capital digest": (change("files", 0, "sha256", to="A" * 64), "files[0].sha256: found"),
    "no cosine": (change(*GROUPS, 1, "similarity", to=1.5), "groups[1].similarity: found 1.5"),
    "factor is a word": (change(*GROUPS, 1, "rescale", "b", to="x"), "rescale.b: found"),
    "group without tasks": (change(*GROUPS, 0, "tasks", to=[]), "groups[0].tasks: found"),
    "method is deep": (change("method", "x", to=json.loads("[" * 300 + "]" * 300)), "no JSON"),
    "path of half a character": (change("files", 0, "path", to="shards/\ud800"), "no JSON"),
    # Rules that relate one value to another.
    "tasks collide": (change("tasks", 1, "name", to="A"), "tasks: found a and A"),
    "task in no group": (
        change(*GROUPS, 1, to={"tasks": ["b"], "kind": "dense", "similarity": None}),
        "task c in 0 groups",
    ),
    "task in a group and not in the list": (
        change(*GROUPS, 0, "tasks", to=["a", "z"]),
        "task z in 1 groups; expected some of a, b, c",
    ),
    "tasks of a group in another order": (
        change(*GROUPS, 1, "tasks", to=["c", "b"]),
        "blocks[0].groups: found another order",
    ),
    "task in two groups": (change(*GROUPS, 0, "tasks", to=["a", "b"]), "task b in 2 groups"),
    "factor is missing": (
        change(*GROUPS, 1, "rescale", to={"b": 1}),
        "rescale: found values of b",
    ),
    "ordinary with masks": (
        change("tasks", 1, "ordinary", to=True),
        "tasks[1].ordinary (b): found true; expected",
    ),
    "dense and not ordinary": (
        change("tasks", 0, "ordinary", to=False),
        "tasks[0].ordinary (a): found false; expected",
    ),
    "private of an unknown task": (
        change("private", 0, "task", to="z"),
        "private[0].task: found unknown task z",
    ),
    "private and in a block": (
        change("private", 0, "tensors", 0, "name", to="q"),
        "private[0] and blocks: found tensor q 2 times",
    ),
    "tensor twice": (
        change("blocks", 0, "tensors", 1, "name", to="q"),
        "blocks: found tensor q 2 times",
    ),
    "groups in another order": (
        lambda content: content["blocks"][0]["groups"].reverse(),
        "blocks[0].groups: found another order",
    ),
    "block twice": (
        lambda content: content["blocks"].extend(content["blocks"]),
        "block layer 0 2 times",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name: str) -> None:
    act, expected = WRONG[name]
    content = sound()
    act(content)
    assert expected in refusal(content)


def test_lists_every_problem_at_once() -> None:
    content = sound()
    content["size"]["bytes"] = "many"
    content["files"][0]["sha256"] = None
    del content["base_model"]
    message = refusal(content)
    assert message.startswith("3 problems with")
    for part in ("size.bytes", "files[0].sha256", "base_model: found nothing"):
        assert part in message


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None])
def test_unknown_version_is_the_only_problem(version: Any) -> None:
    content = {**sound(), "version": version, "tasks": "of another time"}
    message = refusal(content)
    assert message.startswith("1 problem with")
    assert "version: found" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[]", "found []; expected"),
        ('{"format": NaN}', "no JSON"),
        ('{"format": ' + "9" * 5000 + "}", "no JSON"),
        ("[" * 200_000, "no JSON"),
    ],
    ids=range(6),
)
def test_refuses_text_that_is_no_manifest(text: str, reason: str) -> None:
    assert reason in refusal(text)


def test_lists_a_hundred_problems_at_most() -> None:
    content = sound()
    content["tasks"] *= 5000
    assert refusal(content).startswith("100 problems")


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": [0] * 1_000_000}, {"blocks": [{}] * 1_000_000},
     {"task_files": dict.fromkeys(map(str, range(1_000_000)), 0)}],
    ids=["numbers", "objects", "digests"],
)  # fmt: skip
def test_a_million_problems_take_no_time(wrong: dict[str, Any]) -> None:
    text = json.dumps(sound() | wrong)
    started = time.process_time()
    refusal(text)
    assert time.process_time() - started < 5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    ),
    st.data(),
)
def test_any_value_anywhere_is_read_or_refused(value: Any, data: st.DataObject) -> None:
    content = sound()
    place: Any = content
    while True:
        key = data.draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        manifest = read(content)
    except CheckpointError:
        return
    assert read(manifest.to_json()) == manifest


@pytest.mark.parametrize("name", ["a", "digit", "0", "A.b_c-d", "a..b", "x" * 100])
def test_names_of_tasks(name: str) -> None:
    assert task_name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "shards", "Shards", "flexmerge.json", "-a", ".a", "_a", "a/b", "a\\b", "a b",
     "é", "a\n", "x" * 101],
)  # fmt: skip
def test_names_that_no_task_can_have(name: str) -> None:
    assert task_name_problem(name)


def test_colliding_names() -> None:
    assert list(colliding_names(["a", "B", "c"])) == []
    assert list(colliding_names(["a", "B", "A", "b", "a"])) == [("a", "A"), ("B", "b"), ("a", "a")]


def test_manifest_loads_nothing_heavy() -> None:
    code = (
        "import sys, mergekit_ext.flexmerge.manifest; "
        "heavy = {'torch', 'mergekit', 'transformers'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_names() -> None:
    from mergekit_ext import flexmerge

    assert flexmerge.Manifest is Manifest
    assert {"load", "read_manifest", "Manifest"} <= set(dir(flexmerge))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flexmerge.nothing


def test_a_key_that_is_given_twice_is_refused() -> None:
    text = json.dumps(sound()).replace('"version": 1', '"version": 1, "version": 1')
    with pytest.raises(CheckpointError, match="'version' is given twice"):
        parse(Manifest, text, "flexmerge.json")
