"""Heads that a base stores as its embedding, and adapters store twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.io.names import unwrapped
from peft_merge.weight_shapes import Shape


def with_tied_once(adapter: Adapter, shapes: Mapping[str, Shape]) -> Adapter:
    """Without the factors of a head that the base stores as its embedding.

    With `ensure_weight_tying` PEFT gives both the same factors, and stores them twice.
    """
    if not (isinstance(adapter, LoraAdapter) and adapter.config.get("ensure_weight_tying")):
        return adapter
    stored = {name.rpartition(".")[0] for name in shapes}
    unstored = {
        module
        for module in adapter.infos
        if not any(f".{name}".endswith(f".{unwrapped(module)}") for name in stored)
    }
    tied = {module for module in unstored if _is_embedding_again(adapter, module)}
    return replace(
        adapter,
        infos={name: info for name, info in adapter.infos.items() if name not in tied},
        saved={
            name: load
            for name, load in adapter.saved.items()
            if not unwrapped(name).startswith(tuple(f"{unwrapped(module)}." for module in tied))
        },
    )


def _is_embedding_again(adapter: LoraAdapter, module: str) -> bool:
    head = adapter.load(module)
    embeddings = [name for name, info in adapter.infos.items() if info.layout == "embedding"]
    return any(
        torch.equal(head.a.mT, embedding.b)
        and torch.equal(head.b.mT, embedding.a)
        and head.scale == embedding.scale
        for embedding in map(adapter.load, embeddings)
    )
