"""Analyses on disk, found again by what was analysed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.flexmerge.analysis import ALL_TIES, Analysis
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import Source
from mergekit_ext.headers import TensorHeader
from mergekit_ext.kernels.selection import EVERYTHING, Cut

FILE_NAME = "flexmerge_analysis.json"
VERSION = 1
# Neighbours that are looked at when an analysis is wanted.
_MOST_CANDIDATES = 64
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Subject:
    """What an analysis is of. Two with the same digest have the same analysis."""

    digest: str

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
            files = {header.file for header in headers if header.file is not None}
            stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            digest.update(json.dumps([source.name, sorted(stats)]).encode())
        return cls(digest.hexdigest())


def _identity(header: TensorHeader) -> list[Any]:
    return [header.name, header.dtype, list(header.shape), header.offset]


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
    """An analysis of `subject` in `folder` or in a folder inside of it."""
    for path in _candidates(folder):
        found = _read(path, subject)
        if found is not None:
            return found
    return None


def _candidates(folder: Path) -> Iterable[Path]:
    found = [folder / FILE_NAME, *folder.glob(f"*/{FILE_NAME}")]
    existing = [path for path in found if path.is_file() and path.stat().st_size <= _LARGEST]
    return sorted(existing, key=lambda path: path.stat().st_mtime_ns)[: -_MOST_CANDIDATES - 1 : -1]


def _read(path: Path, subject: Subject) -> Analysis | None:
    """The analysis in a file; None if it is of something else, or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["subject"] != subject.digest or content["version"] != VERSION:
            return None
        tasks = tuple(content["tasks"])
        grams = {
            name: torch.tensor(rows, dtype=torch.float64) for name, rows in content["grams"].items()
        }
        cuts = {
            tuple(item["densities"]): [_cut(pattern) for pattern in item["patterns"]]
            for item in content["cuts"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    square = (len(tasks), len(tasks))
    sound = all(g.shape == square and bool(torch.isfinite(g).all()) for g in grams.values())
    return Analysis(tasks, grams, cuts) if sound else None


def _cut(pattern: int) -> Cut:
    return EVERYTHING if pattern == EVERYTHING.pattern else Cut(int(pattern), ALL_TIES)
