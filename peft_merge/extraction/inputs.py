"""Full models as stored: configuration, headers, and tensors that are read one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import FileError, one_line
from mergekit_ext.flexmerge.source import FileSource
from mergekit_ext.io.class_model import class_names, empty_model
from mergekit_ext.io.headers import TensorHeader, read_folder, read_index, weights_of
from peft_merge.io.read import folder_of

_WANTED = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class FullModel:
    """A model's stored tensors.

    Attributes:
        name: as given, without a revision.
        revision: on the Hub.
        config: of transformers.
        headers: of the tensors, by stored name, or by that of a class (`named`).
        load: reads a tensor by the name in its header.
    """

    name: str
    revision: str | None
    config: Any
    headers: Mapping[str, TensorHeader]
    load: Callable[[str], Tensor]

    @classmethod
    def open(cls, source: str | os.PathLike[str], allow_pickle: bool) -> FullModel:
        """Find a folder, or a name on the Hub, and read configuration and headers.

        Raises:
            ConfigError: there is none, its files cannot be used, or it has pickles.
        """
        text, revision = os.fspath(source), ""
        if not os.path.exists(os.path.expanduser(text)):
            text, _, revision = text.partition("@")  # as mergekit writes a revision
        given = text if isinstance(source, str) else Path(text)
        wanted = [*_WANTED, *(_PICKLES if allow_pickle else ())]
        folder = folder_of(given, revision or None, wanted)
        headers = read_folder(folder, allow_pickle=allow_pickle)
        read = _reader(folder, headers)
        return cls(text, revision or None, _configuration(folder), headers, read)

    def named(self, config: Any) -> FullModel:
        """Return the same with the names of the class of a configuration."""
        names = class_names(self.headers, config)
        headers = {names.of[stored]: header for stored, header in self.headers.items()}
        return FullModel(self.name, self.revision, self.config, headers, self.load)

    def tensor(self, name: str) -> Tensor:
        return self.load(self.headers[name].name)


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    where, config = str(folder / "config.json"), None
    try:
        config = AutoConfig.from_pretrained(folder)
        found = f"architectures: {getattr(config, 'architectures', None)}"
    except Exception as error:  # of any kind: whatever a class says to values that it cannot use
        found = f"what transformers does not read ({one_line(error)})"
    if config is None or empty_model(config) is None:
        expected = "a class of transformers, which says what PEFT can adapt"
        raise FileError(where, found, expected)
    return config


def _reader(folder: Path, headers: Mapping[str, TensorHeader]) -> Callable[[str], Tensor]:
    if all(header.file is not None for header in headers.values()):
        by_name = {header.name: header for header in headers.values()}
        return FileSource(str(folder), by_name).tensor
    weights = weights_of(folder)
    assert weights is not None
    shards = {weights.name}
    if weights.name.endswith(".index.json"):
        shards = set(read_index(weights).values())
    state: dict[str, Tensor] = {}
    for shard in sorted(shards):
        found = torch.load(folder / shard, map_location="cpu", weights_only=True, mmap=True)
        state |= found.get("state_dict", found)
    return state.__getitem__
