"""The files of an output's weights: their names, their index, and what is not as planned."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from mergekit_ext.io.planned import Entry, PlannedFile, PlannedFiles

_SUFFIX = ".safetensors"


def names(count: int) -> list[str]:
    """What so many files of weights are called in a Hugging Face checkpoint."""
    if count == 1:
        return [f"model{_SUFFIX}"]
    return [f"model-{k:05d}-of-{count:05d}{_SUFFIX}" for k in range(1, count + 1)]


def remove_others(folder: Path, kept: Collection[str]) -> None:
    """Remove files of weights that are not `kept`."""
    for path in folder.glob(f"*{_SUFFIX}"):
        if path.name not in kept:
            path.unlink()


def finish(
    folder: Path, planned: Sequence[PlannedFile], placed: Mapping[str, tuple[str, Entry]]
) -> None:
    """Make an ordinary checkpoint of files that hold all their tensors, or almost.

    Args:
        folder: where they are.
        planned: the files that were planned.
        placed: the file in which each tensor is, in the order of the output; a tensor that is in
            no planned one has a file of its own. A planned tensor that is not in its planned file
            leaves a hole there, which is taken out.
    """
    files = [kept for file in planned if (kept := _without_holes(folder, file, placed)) is not None]
    paths = {file.path for file in planned}
    files += [PlannedFile(path, (e,)) for path, e in placed.values() if path not in paths]
    final = names(len(files))
    if [file.path for file in files] != final:
        # Twice, because a file may get the name of another.
        for step in ([f"moving-{name}" for name in final], final):
            for file, name in zip(files, step, strict=True):
                (folder / file.path).rename(folder / name)
            files = [PlannedFile(n, file.entries) for n, file in zip(step, files, strict=True)]
    if len(files) > 1:
        _write_index(folder, files, placed)


def _without_holes(
    folder: Path, file: PlannedFile, placed: Mapping[str, tuple[str, Entry]]
) -> PlannedFile | None:
    kept = tuple(entry for entry in file.entries if placed.get(entry.name) == (file.path, entry))
    if len(kept) == len(file.entries):
        return file
    whole = PlannedFile(f"whole-{file.path}", kept)
    if kept:
        opened = PlannedFiles(folder)
        opened.create([whole])
        with (folder / file.path).open("rb") as source:
            for entry in kept:
                source.seek(file.places[entry.name][0])
                opened.put(whole, entry.name, memoryview(source.read(entry.nbytes)))
        opened.close()
    (folder / file.path).unlink()
    return whole if kept else None


def _write_index(folder: Path, files: Iterable[PlannedFile], order: Iterable[str]) -> None:
    found = {entry.name: (file.path, entry.nbytes) for file in files for entry in file.entries}
    content = {
        "metadata": {
            "total_size": sum(nbytes for _, nbytes in found.values()),
            "mergekit_version": metadata.version("mergekit"),
        },
        "weight_map": {name: found[name][0] for name in order},
    }
    text = json.dumps(content, indent=2)
    (folder / f"model{_SUFFIX}.index.json").write_text(text, encoding="utf-8")
