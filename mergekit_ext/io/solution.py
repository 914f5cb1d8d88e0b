"""A folder that keeps what a method has solved for, for merges that differ in how it is used."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import Problem
from mergekit_ext.io.documents import json_object
from mergekit_ext.io.headers import read_safetensors
from mergekit_ext.io.staging import open_as_others, place_problems

_MANIFEST, _LARGEST, _FORMAT = "solution.json", 1 << 24, {"format": "1"}
_REMEDY = "Give another folder: this one stays as it is."


class Solution:
    """One file for each tensor, and what they were solved for, by names that a user understands."""

    def __init__(self, folder: Path, solved_for: Mapping[str, str]):
        self._folder, self._solved_for = folder, {**_FORMAT, **solved_for}

    def problems(self, where: str) -> Iterator[Problem]:
        """Yield why the folder does not fit, or cannot be read."""
        folder, wanted = self._folder, self._solved_for
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            yield from place_problems(folder, where)
            return
        expected = "a folder that does not exist, or that a merge has kept its solution in"
        kept, wrong = json_object(folder / _MANIFEST, expected, _LARGEST)
        if wrong:
            yield Problem(where, *wrong, _REMEDY)
        elif names := [n for n in {**wanted, **kept} if kept.get(n) != wanted.get(n)]:
            found = f"{folder}, which was solved for other {', '.join(names)}"
            yield Problem(where, found, "the solution of this merge", _REMEDY)

    def open(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._solved_for, indent=2)
        (self._folder / _MANIFEST).write_text(text, encoding="utf-8")

    def read(self, name: str) -> dict[str, Tensor]:
        """Return what is kept of tensor `name`; nothing if it is not solved yet."""
        file = self._file(name)
        stored = read_safetensors(file) if file.exists() else {}
        return {key: header.load() for key, header in stored.items()}

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the solution of tensor `name`, unless it is there."""
        if not (file := self._file(name)).exists():
            part = file.with_suffix(".part")
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, part)
            open_as_others(part)
            part.replace(file)

    def _file(self, name: str) -> Path:
        return self._folder / f"{quote(name, safe='')}.safetensors"
