"""Analyses on disk, found again by what was analysed."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ext.flexmerge.analysis import Analysis, cuts_of
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.io.documents import bounded_text, regular
from mergekit_ext.io.schema import Items, Schema, Version, parse

FILE_NAME = "flexmerge_analysis.json"
VERSION = 1
# Neighbours that are looked at when an analysis is wanted.
_MOST_CANDIDATES = 64
_LARGEST = 256 << 20


def subject_of(reader: BlockReader) -> str:
    """Return the digest of all that an analysis depends on but densities.

    Files are identified by path, length and time of change: reading everything in order not to
    read everything would gain nothing.
    """
    layout, digest = reader.layout, hashlib.sha256()
    names = [part.name for block in layout.blocks for part in block.parts]
    blocks = [[block.name, [part.name for part in block.parts]] for block in layout.blocks]
    digest.update(json.dumps([VERSION, layout.tasks, blocks]).encode())
    for source in (reader.base, *reader.models):
        headers = [source.tensors[name] for name in names]
        identities = [[h.name, h.dtype, list(h.shape), h.offset] for h in headers]
        digest.update(json.dumps(identities).encode())
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
        digest.update(json.dumps([source.name, sorted(stats)]).encode())
    return digest.hexdigest()


class _Cuts(Schema):
    densities: Items[float]
    patterns: Items[int]


class _Stored(Schema):
    """What `save` writes and `find` needs; a file has more that is worth reading."""

    format: Literal["flexmerge-analysis"]
    version: Version
    subject: str
    grams: dict[str, Any]  # rows of numbers; a hostile file may have millions of them
    cuts: Items[_Cuts]


def save(folder: Path, analysis: Analysis, subject: str, layout: Layout) -> None:
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
    text = json.dumps(content, allow_nan=False) + "\n"
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def find(folder: Path, subject: str, layout: Layout) -> Analysis | None:
    """Return an analysis of a subject in `folder` or in a folder inside of it, the newest."""
    times = {}
    for path in (folder / FILE_NAME, *folder.glob(f"*/{FILE_NAME}")):
        with suppress(OSError):  # it may be gone by now, or no file
            times[path] = regular(path).st_mtime_ns
    for path in sorted(times, key=times.__getitem__, reverse=True)[:_MOST_CANDIDATES]:
        # It may be of something else, or broken.
        with suppress(OSError, ValueError, KeyError, ArithmeticError, TypeError, RuntimeError):
            content = parse(_Stored, bounded_text(path, _LARGEST), str(path))
            if content.subject == subject:
                return _analysis(content, layout)
    return None


def _analysis(content: _Stored, layout: Layout) -> Analysis:
    count, grams = len(layout.tasks), dict[str, Tensor]()
    for block in layout.blocks:
        gram = grams[block.name] = torch.tensor(content.grams[block.name], dtype=torch.float64)
        symmetric = gram.shape == (count, count) and torch.equal(gram, gram.T)
        if not symmetric or bool((gram.diagonal() < 0).any()):
            raise ValueError("no matrix of inner products")
    if any(len(cuts.patterns) != count for cuts in content.cuts):
        raise ValueError("no pattern for each task")
    return Analysis(grams, {cuts.densities: cuts_of(cuts.patterns) for cuts in content.cuts})
