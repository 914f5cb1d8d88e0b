"""Analyses on disk, found again by what was analysed."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ext.flexmerge.analysis import Analysis
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import Source
from mergekit_ext.flexmerge.trim_search import ALL_TIES
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.schema import Items, Schema, Version, parse
from mergekit_ext.kernels.selection import EVERYTHING, Cut

FILE_NAME = "flexmerge_analysis.json"
VERSION = 1
# Neighbours that are looked at when an analysis is wanted.
_MOST_CANDIDATES = 64
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Subject:
    """What an analysis is of. Two with the same digest have the same analysis.

    Attributes:
        digest: of everything that an analysis depends on, but densities.
        tasks: their names.
        blocks: theirs.
    """

    digest: str
    tasks: tuple[str, ...]
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout, base: Source, models: Sequence[Source]) -> Subject:
        """Digest of names, blocks, and the identity of every stored tensor that is merged.

        A file is identified by its path, length and time of change, not by its content: reading
        everything in order not to read everything would gain nothing.
        """
        digest = hashlib.sha256()
        names = [part.name for block in layout.blocks for part in block.parts]
        blocks = [[block.name, [part.name for part in block.parts]] for block in layout.blocks]
        digest.update(json.dumps([VERSION, layout.tasks, blocks]).encode())
        for source in (base, *models):
            headers = [source.tensors[name] for name in names]
            digest.update(json.dumps([_identity(header) for header in headers]).encode())
            stats = [
                (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files
            ]
            digest.update(json.dumps([source.name, sorted(stats)]).encode())
        found = tuple(block.name for block in layout.blocks)
        return cls(digest.hexdigest(), layout.tasks, found)


def _identity(header: TensorHeader) -> list[Any]:
    return [header.name, header.dtype, list(header.shape), header.offset]


class _Cuts(Schema):
    """The cuts of all tasks for some densities."""

    densities: Items[float]
    patterns: Items[int]


class _Rows(Schema):
    """Inner products of one block."""

    rows: Items[Items[float]]


class _Stored(Schema):
    """What `save` writes and `find` needs; a file has more that is worth reading."""

    format: Literal["flexmerge-analysis"]
    version: Version
    subject: str
    grams: dict[str, Any]  # `_Rows` each; a hostile file may have millions of them
    cuts: Items[_Cuts]


def save(path: Path, analysis: Analysis, subject: Subject, facts: Mapping[str, Any]) -> None:
    """Write an analysis.

    Args:
        path: the file.
        analysis: what was measured.
        subject: what it was measured on.
        facts: what is worth reading besides, such as kinds and depths of blocks.
    """
    content = {
        "format": "flexmerge-analysis",
        "version": VERSION,
        "subject": subject.digest,
        **facts,
        "tasks": list(analysis.tasks),
        "grams": {name: gram.tolist() for name, gram in analysis.grams.items()},
        "cuts": [
            {"densities": list(densities), "patterns": [cut.pattern for cut in cuts]}
            for densities, cuts in analysis.cuts.items()
        ],
    }
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def find(folder: Path, subject: Subject) -> Analysis | None:
    """Return an analysis of `subject` in `folder` or in a folder inside of it."""
    for path in _candidates(folder):
        found = _read(path, subject)
        if found is not None:
            return found
    return None


def _candidates(folder: Path) -> Iterable[Path]:
    times = {}
    for path in (folder / FILE_NAME, *folder.glob(f"*/{FILE_NAME}")):
        # It may be gone by now, or not readable.
        with suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST:
                times[path] = status.st_mtime_ns
    return sorted(times, key=times.__getitem__, reverse=True)[:_MOST_CANDIDATES]


def _read(path: Path, subject: Subject) -> Analysis | None:
    """Return the analysis in a file; None if it is of something else, or broken."""
    try:
        content = parse(_Stored, path.read_bytes(), str(path))
        if content.subject != subject.digest:
            return None
        grams = {name: _gram(content.grams[name], subject) for name in subject.blocks}
        cuts = {each.densities: _cuts(each.patterns, subject) for each in content.cuts}
    except (OSError, ValueError, KeyError, ArithmeticError):
        return None
    return Analysis(subject.tasks, grams, cuts)


def _gram(rows: Any, subject: Subject) -> Tensor:
    gram = torch.tensor(_Rows(rows=rows).rows, dtype=torch.float64)
    sound = (
        gram.shape == (len(subject.tasks), len(subject.tasks))
        and torch.equal(gram, gram.T)
        and bool((gram.diagonal() >= 0).all())
    )
    if not sound:
        raise ValueError("no matrix of inner products")
    return gram


def _cuts(patterns: tuple[int, ...], subject: Subject) -> list[Cut]:
    if len(patterns) != len(subject.tasks):
        raise ValueError("no pattern for each task")
    every = EVERYTHING.pattern
    return [EVERYTHING if each == every else Cut(each, ALL_TIES) for each in patterns]
