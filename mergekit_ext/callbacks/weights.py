"""Weights of one moment: in memory, or in a folder that is read tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ext.dtypes import PACKED
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge import finite
from mergekit_ext.io.headers import HeaderError, read_safetensors

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


class FileTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, read when they are asked for.

    Raises:
        HeaderError: a file, or a dtype in it, cannot be read.
    """

    def __init__(self, files: list[Path]):
        self._files: dict[str, Path] = {}
        for file in files:
            headers = read_safetensors(file)
            if packed := [h for h in headers.values() if h.dtype in PACKED]:
                found = f"{packed[0].dtype} in {packed[0].name}"
                raise HeaderError(str(file), found, "a dtype that can be converted")
            self._files.update(dict.fromkeys(headers, file))

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
        ConfigError: there are no safetensors files in it, or they cannot be read.
    """
    place = Path(folder)
    config = place / CONFIG
    try:
        if config.is_file() and (place / ADAPTER).is_file():
            tensors = FileTensors([place / ADAPTER])
            return Weights(tensors, json.loads(config.read_text(encoding="utf-8")), place)
        if files := sorted(place.glob("*.safetensors")):
            return Weights(FileTensors(files), None, place)
    except Exception as error:  # safetensors has one of its own, which derives from no other
        found, remedy = f"files that cannot be read ({error})", "Save it again."
    else:
        found, remedy = _lacking(place)
    problem = Problem(str(place), found, "a saved model or adapter", remedy)
    raise ConfigError([problem], "merging checkpoints") from None


def _lacking(place: Path) -> tuple[str, str]:
    if not place.is_dir():
        remedy = "Keep as many checkpoints as are merged (`save_total_limit` of a Trainer)."
        return "no such folder", remedy
    if names := sorted(file.parent.name for file in place.glob(f"*/{ADAPTER}")):
        return f"only adapters of other names: {', '.join(names)}", "Give `adapter` one of them."
    return "a folder without safetensors files", "Save with safe_serialization."


def saved(checkpoint: Path, adapter: str | None) -> Path:
    """Where in a checkpoint the weights are: PEFT gives adapters folders unless called default."""
    place = checkpoint / (adapter or "")
    return place if adapter != "default" and (place / CONFIG).is_file() else checkpoint


def write(weights: Weights, target: Path) -> None:
    """Write weights into the folder `target`, which appears when it is complete."""
    from mergekit_ext.io.staging import staged

    with staged(target) as staging:
        fill(staging.output, weights)


def fill(folder: Path, weights: Weights) -> None:
    """Write weights into a folder that is empty or does not exist, file by file."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / (FULL if weights.config is None else ADAPTER), {"format": "pt"})
    if weights.config is not None:
        text = json.dumps(dict(weights.config), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")


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


def copied(weights: Weights) -> Weights:
    """A copy on the CPU that nothing else changes."""
    tensors = {k: t.detach().to("cpu", copy=True) for k, t in weights.tensors.items()}
    return Weights(tensors, weights.config, weights.folder)


def renamed(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by every name of a model's state, of which tied ones have several.

    Raises:
        ConfigError: the model has other names.
    """
    names = untied(state)
    given = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    left = sorted(set(names.values()) - given.keys())
    strange = sorted(tensors.keys() - names.keys())
    if left or strange:
        found = f"no weights for {left[:3]}" if left else f"no place for {strange[:3]}"
        problem = Problem("model", found, "the model that was trained")
        raise ConfigError([problem], "merging checkpoints")
    return {name: given[first] for name, first in names.items()}


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights with NaN or infinity in them.

    Raises:
        NonFiniteError: with the first such tensor, and what the weights are.
    """
    for name, tensor in tensors.items():
        finite.require_finite(tensor, name, what)
