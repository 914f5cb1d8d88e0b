"""Weights of one moment: in memory, or in a folder that is read tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ext.errors import ConfigError, NonFiniteError, Problem
from mergekit_ext.kernels.numerics import count_non_finite

CONFIG = "adapter_config.json"
FULL, ADAPTER = "model.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class Weights:
    """Tensors by name, tied ones once.

    Attributes:
        tensors: all of them; a mapping that reads from files when it is asked.
        config: of the adapter that they are, as in adapter_config.json; None for a whole model.
        folder: where they were read from, if they were.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    folder: Path | None = None

    @property
    def bytes(self) -> int:
        """What the tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class FileTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, read when they are asked for."""

    def __init__(self, files: list[Path]):
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                self._files.update(dict.fromkeys(opened.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read(folder: str | os.PathLike[str]) -> Weights:
    """The weights in the folder of a checkpoint or of an adapter.

    Raises:
        ConfigError: there are no safetensors files in it.
    """
    place = Path(folder)
    config = place / CONFIG
    if config.is_file() and (place / ADAPTER).is_file():
        tensors = FileTensors([place / ADAPTER])
        return Weights(tensors, json.loads(config.read_text(encoding="utf-8")), place)
    files = sorted(place.glob("*.safetensors"))
    if not files:
        gone = not place.is_dir()
        found = "no such folder" if gone else "a folder without safetensors files"
        remedy = (
            "Keep as many checkpoints as are merged (`save_total_limit` of a Trainer)."
            if gone
            else "Save with safe_serialization."
        )
        raise ConfigError(
            [Problem(str(place), found, "a saved model or adapter", remedy)], "merging checkpoints"
        )
    return Weights(FileTensors(files), None, place)


def write(weights: Weights, target: Path) -> None:
    """Write weights into the folder `target`, which appears when it is complete."""
    from safetensors.torch import save_file

    from mergekit_ext.rooms import hidden_room

    target.parent.mkdir(parents=True, exist_ok=True)
    with hidden_room(target, target.parent) as room:
        folder = room / "snapshot"
        folder.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
        save_file(tensors, folder / (FULL if weights.config is None else ADAPTER), {"format": "pt"})
        if weights.config is not None:
            text = json.dumps(dict(weights.config), indent=2, sort_keys=True)
            (folder / CONFIG).write_text(text, encoding="utf-8")
        folder.rename(target)


def untied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name, the first name of the same tensor; itself where nothing is tied."""
    seen: dict[tuple[Any, ...], str] = {}
    return {
        name: seen.setdefault(
            (t.data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
            if t.numel()
            else (name,),
            name,
        )
        for name, t in tensors.items()
    }


def require_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse a snapshot with NaN or infinity in it.

    Raises:
        NonFiniteError: with the first such tensor and the step.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (count := count_non_finite(tensor)):
            raise NonFiniteError(name, f"at step {step}", count, tensor.numel())
