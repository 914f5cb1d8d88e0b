"""Pickles, which mergekit's loader holds a whole file of at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergekit_ext.host.adapters.loader import file_with_adapter
from mergekit_ext.host.checks import hub
from mergekit_ext.io import paths
from mergekit_ext.io.headers import HeaderError, read_index, weights_of


def pickled_bytes(models: Iterable[Any], options: Any) -> int:
    """Bytes that the loaders of these models hold of pickles: of each the largest file.

    Args:
        models: mergekit's `ModelReference`s, or names of files as mergekit-pytorch has them. Those
            with adapters on one base share its loader.
        options: mergekit's. With `lazy_unpickle` single tensors are read.
    """
    if options.lazy_unpickle:
        return 0
    return sum(_largest(place) for place in {_place(model, options) for model in models} if place)


def _place(model: Any, options: Any) -> Path | None:
    """The folder or file that a model is read from; None while it is not here."""
    if isinstance(model, str):
        reference = file_with_adapter(model)
        return Path(model if reference is None else reference.model.path)
    if paths.exists(model.model.path):
        return Path(model.model.path)
    return hub.cached_folder(model.model, options)


def _largest(place: Path) -> int:
    weights = weights_of(place) if place.is_dir() else place
    if weights is None:
        return 0
    try:
        shards = (
            {place / shard for shard in read_index(weights).values()}
            if weights.name.endswith(".index.json")
            else {weights}
        )
        pickles = [shard for shard in shards if shard.suffix != ".safetensors"]
        return max((shard.stat().st_size for shard in pickles), default=0)
    except (HeaderError, OSError):  # said where headers are read
        return 0
