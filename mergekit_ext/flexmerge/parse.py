"""JSON to a `Manifest`. Nothing in the text is trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

from mergekit_ext.errors import CheckpointError, Problem
from mergekit_ext.flexmerge.json_value import (
    MOST_64_BITS,
    MOST_PROBLEMS,
    EnoughError,
    Value,
    decode,
    depth,
    shown,
)
from mergekit_ext.flexmerge.manifest import (
    FILE_KINDS,
    FORMAT,
    GROUP_KINDS,
    MASKED,
    SHARDS,
    VERSION,
    Block,
    Group,
    Manifest,
    Private,
    ShardFile,
    Size,
    Task,
    TensorInfo,
    task_name_problem,
)
from mergekit_ext.flexmerge.rules import broken_rules

# One entry a tensor: a model of 100,000 tensors takes some 20 MB.
LARGEST = 64 * 1024 * 1024
_DEEPEST = 32
_MOST_DIMENSIONS = 64
_DIGEST, _DIGITS = re.compile(r"[0-9a-f]{64}"), "64 digits, 0-9 and a-f"
# One file name on every system: no separator, no drive, no control character.
_SHARD_NAME = re.compile(r"[^/\\:\x00-\x1f\x7f]{1,200}")
# A cosine is rounded.
_COSINE = 1.0 + 1e-6


def parse(text: str, where: str) -> Manifest:
    """`Manifest.from_json`."""
    if len(text) > LARGEST:
        raise CheckpointError(
            [Problem(where, f"{len(text):,} characters", f"{LARGEST:,} at most")], where
        )
    try:
        content = decode(text)
    except ValueError as error:
        raise CheckpointError([Problem(where, f"no JSON ({error})", "JSON")], where) from None
    problems: list[Problem] = []
    root = Value(content, "", problems)
    if not isinstance(content, dict):
        raise CheckpointError([Problem(where, shown(content), "an object")], where)
    _known_version(root)
    manifest = None
    # Of another version nothing else can be said.
    if not problems:
        with suppress(EnoughError):
            manifest = _manifest(root)
    if manifest is not None and not problems:
        problems += listed(broken_rules(manifest))
    if manifest is None or problems:
        raise CheckpointError(problems, where)
    return manifest


def listed(problems: Iterable[Problem]) -> list[Problem]:
    """The first hundred problems, so that a hostile file has no message of gigabytes."""
    return list(islice(problems, MOST_PROBLEMS))


def _known_version(root: Value) -> None:
    root["format"].choice((FORMAT,))
    version = root["version"]
    if type(version.value) is not int or version.value != VERSION:
        version.wrong(f"{VERSION}, the version that this release reads")


def _manifest(root: Value) -> Manifest:
    method, size = root["method"], root["size"]
    if depth(method.value) > _DEEPEST:
        method.wrong(f"at most {_DEEPEST} levels")
    size.members()
    return Manifest(
        generator=root["generator"].text(),
        method=method.members(),
        base_model=root["base_model"].text(),
        size=Size(
            models=size["models"].number(0.0),
            bytes=size["bytes"].count(),
            unit_bytes=size["unit_bytes"].count(),
            private_bytes=size["private_bytes"].count(),
        ),
        tasks=root["tasks"].each(_task, least=1),
        files=root["files"].each(_file),
        blocks=root["blocks"].each(_block),
        private=root["private"].each(_private),
        task_files=_task_files(root),
    )


def _task(value: Value) -> Task:
    value.members()
    name = value["name"].text()
    reason = task_name_problem(name)
    if isinstance(value["name"].value, str) and reason is not None:
        value["name"].wrong(f"the name of a folder, but {reason}")
    return Task(name, value["model"].text(), value["ordinary"].flag())


def _file(value: Value) -> ShardFile:
    value.members()
    return ShardFile(
        path=value["path"].text(_is_shard, f"{SHARDS}/ and one file name"),
        kind=value["kind"].choice(FILE_KINDS),
        tasks=value["tasks"].each(Value.name),
        bytes=value["bytes"].count(),
        sha256=value["sha256"].text(_DIGEST.fullmatch, _DIGITS),
    )


def _task_files(root: Value) -> dict[str, str]:
    """Of manifests of an older version there are none."""
    if "task_files" not in root.members():
        return {}
    files = root["task_files"]
    return {name: files[name].text(_DIGEST.fullmatch, _DIGITS) for name in files.members()}


def _is_shard(path: str) -> bool:
    folder, _, name = path.partition("/")
    return (
        folder == SHARDS and bool(_SHARD_NAME.fullmatch(name)) and name != "." and ".." not in name
    )


def _block(value: Value) -> Block:
    value.members()
    return Block(
        name=value["name"].name(),
        kind=value["kind"].name(),
        tensors=value["tensors"].each(_tensor, least=1),
        groups=value["groups"].each(_group, least=1),
    )


def _tensor(value: Value) -> TensorInfo:
    value.members()
    shape = value["shape"].each(Value.count)
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) > MOST_64_BITS:
        value["shape"].wrong(
            f"{_MOST_DIMENSIONS} sizes at most, of a product that fits into 64 bits"
        )
    return TensorInfo(value["name"].name(), shape)


def _group(value: Value) -> Group:
    value.members()
    kind, similarity = value["kind"].choice(GROUP_KINDS), value["similarity"]
    rescale: dict[str, float] = {}
    if kind == MASKED:
        factors = value["rescale"]
        rescale = {task: factors[task].number() for task in factors.members()}
    return Group(
        tasks=value["tasks"].each(Value.name, least=1),
        kind=kind,
        similarity=None if similarity.value is None else similarity.number(-_COSINE, _COSINE),
        rescale=rescale,
    )


def _private(value: Value) -> Private:
    value.members()
    return Private(value["task"].name(), value["tensors"].each(_tensor))
