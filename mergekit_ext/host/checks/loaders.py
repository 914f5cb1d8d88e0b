"""What loading the inputs takes besides their tensors: whole pickles, and tokenizers."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.host.adapters.loader import file_with_adapter
from mergekit_ext.host.checks import hub
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.settings import wants_tokenizer
from mergekit_ext.io.headers import HeaderError, read_index, weights_of

_TOKENIZER, _TOKENS, _ADDED = "tokenizer.json", "vocab.json", "added_tokens.json"
# Beside which `_TOKENIZER` is made when it is loaded, and larger by about this factor.
_OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_CONVERTED = 4
_LARGEST = 64 << 20  # four times as long as the longest in use
# Measured with 32,000 to 128,000 tokens: tables, texts and merges of every tokenizer, and what
# reads, copies and compares one.
_EACH, _ONCE = 8, 16


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the output, where mergekit builds a tokenizer and aligns the inputs.

    Attributes:
        rows: how many tokens embeddings will have; None where not all files could be read.
        joined: whether the tokens of all models come together; then without `rows` the sum of the
            inputs' sizes is the most.
        bytes: memory that the tokenizers take.
    """

    rows: int | None
    joined: bool
    bytes: int

    def at_least(self, sizes: Iterable[int]) -> int:
        """Rows that the output surely has, about, if those of the inputs are `sizes`."""
        return max(sizes) if self.rows is None else self.rows

    def at_most(self, sizes: Iterable[int]) -> int:
        """Rows that it may have."""
        if self.rows is not None:
            return self.rows
        return sum(sizes) if self.joined else max(sizes)


def vocabulary(config: Any, options: Any) -> Vocabulary | None:
    """What is known of it before a tokenizer is loaded; None if each tensor keeps its rows."""
    if not wants_tokenizer(config):
        return None
    asked: Any = getattr(config, "tokenizer", None)
    source = config.tokenizer_source or asked.source
    models = list(models_at(config))
    first = config.base_model or models[0]
    named = models if source == "union" else [first if source == "base" else source]
    folders = [folder for model in models if (folder := _place(model, options)) is not None]
    joined = [folder for model in named if (folder := _place(model, options)) is not None]
    known = _tokens(joined) if len(joined) == len(named) else None
    rows = None
    if known is not None:
        rows = len(known.union((asked.tokens or {}) if asked else ()))
        multiple = (asked.pad_to_multiple_of if asked else None) or 1
        rows = -(-rows // multiple) * multiple
    lengths = [_length(folder) for folder in dict.fromkeys(folders)]
    loaded = _EACH * sum(lengths) + _ONCE * max(lengths, default=0)
    return Vocabulary(rows, source == "union", loaded)


def _length(folder: Path) -> int:
    """Bytes of the tokenizer's file, or of what it will be."""
    try:
        if (folder / _TOKENIZER).is_file():
            return (folder / _TOKENIZER).stat().st_size
        others = [folder / name for name in (_TOKENS, *_OTHERS)]
        return _CONVERTED * max((f.stat().st_size for f in others if f.is_file()), default=0)
    except OSError:
        return 0


def _tokens(folders: Iterable[Path]) -> set[str] | None:
    """All of several tokenizers; None if a file is not there or not as transformers writes it."""
    found: set[str] = set()
    seen: list[Path] = []
    try:
        for folder in folders:
            file = next(p for p in (folder / _TOKENIZER, folder / _TOKENS) if p.is_file())
            if any(filecmp.cmp(file, other, shallow=False) for other in seen):
                continue
            if file.stat().st_size > _LARGEST:
                return None
            seen.append(file)
            found.update(_of_tokenizer(file) if file.name == _TOKENIZER else _of_tables(folder))
    except (StopIteration, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None  # transformers, which is asked later, may know better
    return found if all(isinstance(token, str) for token in found) else None


def _of_tokenizer(file: Path) -> Iterator[str]:
    content = json.loads(file.read_bytes())
    tokens = content["model"]["vocab"]
    # With scores it is a list of pairs.
    yield from tokens if isinstance(tokens, dict) else (pair[0] for pair in tokens)
    yield from (token["content"] for token in content.get("added_tokens") or ())


def _of_tables(folder: Path) -> Iterator[str]:
    yield from json.loads((folder / _TOKENS).read_bytes())
    if (folder / _ADDED).is_file():
        yield from json.loads((folder / _ADDED).read_bytes())


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
    """The folder or file that a model is read from; None while it is not on this machine."""
    if isinstance(model, str):
        reference = file_with_adapter(model)
        return Path(model if reference is None else reference.model.path)
    if os.path.exists(model.model.path):
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
