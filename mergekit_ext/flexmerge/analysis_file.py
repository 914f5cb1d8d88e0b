"""Analyses on disk, found again by what was analysed."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithm import Cuts
from mergekit_ext.flexmerge.analysis import ALL_TIES, Analysis
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import Source
from mergekit_ext.io.schema import Items, Schema, Version, parse
from mergekit_ext.kernels.selection import EVERYTHING, Cut

FILE_NAME = "flexmerge_analysis.json"
VERSION = 1
# Neighbours that are looked at when an analysis is wanted.
_MOST_CANDIDATES = 64
_LARGEST = 256 << 20


def subject_of(layout: Layout, base: Source, models: Sequence[Source]) -> str:
    """Return the digest of all that an analysis depends on but densities.

    Files are identified by path, length and time of change: reading everything in order not to
    read everything would gain nothing.
    """
    digest = hashlib.sha256()
    names = [part.name for block in layout.blocks for part in block.parts]
    blocks = [[block.name, [part.name for part in block.parts]] for block in layout.blocks]
    digest.update(json.dumps([VERSION, layout.tasks, blocks]).encode())
    for source in (base, *models):
        headers = [source.tensors[name] for name in names]
        identities = [[h.name, h.dtype, list(h.shape), h.offset] for h in headers]
        digest.update(json.dumps(identities).encode())
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
        digest.update(json.dumps([source.name, sorted(stats)]).encode())
    return digest.hexdigest()


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


def save(path: Path, analysis: Analysis, subject: str, layout: Layout) -> None:
    """Write an analysis of a subject, with what a reader may want to know of the blocks."""
    content = {
        "format": "flexmerge-analysis",
        "version": VERSION,
        "subject": subject,
        "blocks": [
            {"name": b.name, "kind": b.kind, "depth": b.depth, "elements": b.size}
            for b in layout.blocks
        ],
        "tasks": list(layout.tasks),
        "grams": {name: gram.tolist() for name, gram in analysis.grams.items()},
        "cuts": [
            {"densities": list(densities), "patterns": [cut.pattern for cut in cuts]}
            for densities, cuts in analysis.cuts.items()
        ],
    }
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def find(folder: Path, subject: str, layout: Layout) -> Analysis | None:
    """Return an analysis of a subject in `folder` or in a folder inside of it."""
    for path in _candidates(folder):
        # It may be of something else, or broken.
        with suppress(OSError, ValueError, KeyError, ArithmeticError):
            content = parse(_Stored, path.read_text(encoding="utf-8"), str(path))
            if content.subject == subject:
                count = len(layout.tasks)
                grams = {b.name: _gram(content.grams[b.name], count) for b in layout.blocks}
                cuts = {each.densities: _cuts(each.patterns, count) for each in content.cuts}
                return Analysis(grams, cuts)
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


def _gram(rows: Any, count: int) -> Tensor:
    gram = torch.tensor(_Rows(rows=rows).rows, dtype=torch.float64)
    symmetric = gram.shape == (count, count) and torch.equal(gram, gram.T)
    if not symmetric or bool((gram.diagonal() < 0).any()):
        raise ValueError("no matrix of inner products")
    return gram


def _cuts(patterns: tuple[int, ...], count: int) -> Cuts:
    if len(patterns) != count:
        raise ValueError("no pattern for each task")
    return [EVERYTHING if p == EVERYTHING.pattern else Cut(p, ALL_TIES) for p in patterns]
