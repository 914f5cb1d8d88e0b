"""Seeds for parts of a merge, so that no part's random numbers depend on what came before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived(seed: int, *names: str | int) -> int:
    """Return a seed for the part of the work called `names`, from 0 to 2**63 - 1."""
    key = "/".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generators(seed: int, module: str, count: int, part: str = "weight") -> list[torch.Generator]:
    """Return one generator on the CPU for each of `count` adapters, seeded by its index.

    The same seed drops the same entries whatever other modules are merged, in which order, and on
    which device. `part` distinguishes a module's weight from its bias.
    """
    keys = (f"{seed}\0{module}\0{part}\0{index}" for index in range(count))
    digests = (hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    seeds = (int.from_bytes(digest, "little", signed=True) for digest in digests)
    return [torch.Generator().manual_seed(own) for own in seeds]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators start from `seed`; afterwards they are as before.

    Args:
        seed: for the CPU's generator and that of `device`.
        device: the one that the work inside is done on.
    """
    own = [] if device.type == "cpu" else [device]
    kind = device.type if own else "cuda"
    with torch.random.fork_rng(own, device_type=kind):
        # Not torch.manual_seed: threads may be drawing from the generators of other devices.
        torch.default_generator.manual_seed(seed)
        if own:
            _seed_device(seed, device)
        yield


def _seed_device(seed: int, device: torch.device) -> None:
    module = torch.get_device_module(device)
    if hasattr(module, "default_generators"):
        module.default_generators[device.index or 0].manual_seed(seed)
    else:
        module.manual_seed(seed)
