"""Reading flexmerge.json: nothing in it is trusted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit_ext.errors import CheckpointError, Problem
from peft_merge.flexmerge.manifest import (
    FILE_NAME,
    FORMAT,
    VERSION,
    Block,
    Group,
    Manifest,
    StoredFile,
    Task,
    task_name_problem,
)
from peft_merge.io.tensors import CONFIG, SAFETENSORS

_DAMAGED = "Copy or download the file again."
# More would be no manifest.
_LARGEST = 1 << 26
# Nobody reads more, and a hostile manifest may have millions.
_MOST_PROBLEMS = 100


def open_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read the manifest of a folder and compare its files with it.

    Args:
        folder: that a merge wrote.
        verify: also compare digests, which reads every file once.

    Raises:
        CheckpointError: something is not as docs/adapters-flexmerge.md says; it lists everything.
    """
    manifest = from_json(_text(folder / FILE_NAME), str(folder / FILE_NAME))
    wrong = (p for task in manifest.tasks for p in _file_problems(folder, task, verify))
    if problems := list(islice(wrong, _MOST_PROBLEMS)):
        raise CheckpointError(problems, str(folder))
    return manifest


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        remedy = "Give the folder that `merge_method: flexmerge` wrote."
        problem = Problem(str(path), f"no readable file ({error})", "a manifest in UTF-8", remedy)
        raise CheckpointError([problem], str(path.parent)) from None


def from_json(text: str, where: str) -> Manifest:
    """A manifest of version 1, complete and consistent in itself.

    Raises:
        CheckpointError: it is not.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise TypeError("it is no object")
    except (ValueError, TypeError, RecursionError) as error:
        problem = Problem(where, f"something else ({error})", "a JSON object", _DAMAGED)
        raise CheckpointError([problem], where) from None
    found = (content.get("format"), content.get("version"))
    if found != (FORMAT, VERSION) or isinstance(found[1], bool):
        shown = f"format {found[0]!r}, version {found[1]!r}"
        expected = f"format {FORMAT!r}, version {VERSION}"
        remedy = "A newer release may read it."
        raise CheckpointError([Problem(where, shown, expected, remedy)], where)
    try:
        manifest = Manifest(
            kind=_text_of(content["kind"]),
            method=_object(content["method"]),
            size=_object(content["size"]),
            tasks=tuple(_task(item) for item in _list(content["tasks"])),
            blocks=tuple(_block(item) for item in _list(content["blocks"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        shown = f"an entry that is missing or of another kind ({error!r})"
        raise CheckpointError([Problem(where, shown, "a manifest", _DAMAGED)], where) from None
    if problems := list(islice(_inconsistent(manifest, where), _MOST_PROBLEMS)):
        raise CheckpointError(problems, where)
    return manifest


def _task(item: Any) -> Task:
    source = item["source"]
    files = tuple(
        StoredFile(_text_of(f["name"]), _whole(f["bytes"]), _text_of(f["sha256"]))
        for f in _list(item["files"])
    )
    return Task(_text_of(item["name"]), None if source is None else _text_of(source), files)


def _block(item: Any) -> Block:
    groups = tuple(
        Group(
            tuple(map(_text_of, _list(group["tasks"]))),
            None if group["similarity"] is None else float(group["similarity"]),
            tuple(map(_text_of, _list(group["modules"]))),
        )
        for group in _list(item["groups"])
    )
    return Block(_text_of(item["name"]), groups)


def _text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is no whole number from 0")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _inconsistent(manifest: Manifest, where: str) -> Iterator[Problem]:
    tasks = [task.name for task in manifest.tasks]
    if manifest.kind not in ("lora", "ia3"):
        yield Problem(f"{where}: kind", repr(manifest.kind), "lora or ia3", _DAMAGED)
    if not tasks or len({name.casefold() for name in tasks}) < len(tasks):
        yield Problem(f"{where}: tasks", repr(tasks), "names that differ, one at least", _DAMAGED)
    for task in manifest.tasks:
        if (reason := task_name_problem(task.name)) is not None:
            remedy = "Do not use it unless you know who made it."
            yield Problem(f"{where}: tasks", repr(task.name), f"a task's name: {reason}", remedy)
        files = [file.name for file in task.files]
        if sorted(files) != [CONFIG, SAFETENSORS]:
            expected = f"{CONFIG} and {SAFETENSORS}"
            yield Problem(f"{where}: files of {task.name}", repr(files), expected, _DAMAGED)
    blocks = [block.name for block in manifest.blocks]
    if twice := [name for name, count in Counter(blocks).items() if count > 1]:
        yield Problem(f"{where}: blocks", f"{twice[0]} twice", "each block once", _DAMAGED)
    for block in manifest.blocks:
        members = [name for group in block.groups for name in group.tasks]
        if sorted(members) != sorted(tasks):
            found = f"groups of {members}"
            yield Problem(f"{where}: {block.name}", found, f"each of {tasks} once", _DAMAGED)


def _file_problems(folder: Path, task: Task, verify: bool) -> Iterator[Problem]:
    for file in task.files:
        path = folder / task.name / file.name
        where = f"{task.name}/{file.name}"
        try:
            inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        except (OSError, RuntimeError) as error:
            yield Problem(where, f"no file ({error})", "a file", _DAMAGED)
            continue
        if not inside or not path.is_file():
            remedy = (
                "Do not use it unless you know who made it. A copy from the Hub's cache has such "
                "links: download it with `local_dir`."
            )
            yield Problem(where, "a link to another place, or no file", "a file in it", remedy)
        elif path.stat().st_size != file.bytes:
            found = f"{path.stat().st_size} bytes"
            yield Problem(where, found, f"{file.bytes} bytes", _DAMAGED)
        elif verify and (digest := StoredFile.of(path).sha256) != file.sha256:
            yield Problem(where, f"SHA-256 {digest}", file.sha256, _DAMAGED)
