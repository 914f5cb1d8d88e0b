"""Random generators that depend on nothing but the seed, the module and the adapter."""

from __future__ import annotations

import hashlib

import torch


def generators(seed: int, module: str, count: int, part: str = "weight") -> list[torch.Generator]:
    """One generator on the CPU for each of `count` adapters, by its index.

    The same seed drops the same entries whatever other modules are merged, in which order, and on
    which device. `part` tells a module's weight from its bias.
    """
    return [_generator(f"{seed}\0{module}\0{part}\0{index}") for index in range(count)]


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
