"""Random numbers: seeds that do not depend on what came before, and DARE, which drops by them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import compute_dtype


def derived(seed: int, *names: str | int) -> int:
    """Return a seed for the part of the work called `names`, from 0 to 2**63 - 1."""
    key = "/".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generators(seed: int, module: str, count: int, part: str = "weight") -> list[torch.Generator]:
    """Return one generator on the CPU for each of `count` adapters, seeded by its index."""
    keys = (f"{seed}\0{module}\0{part}\0{index}" for index in range(count))
    digests = (hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    seeds = (int.from_bytes(digest, "little", signed=True) for digest in digests)
    return [torch.Generator().manual_seed(own) for own in seeds]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Start torch's generators of the CPU and `device` from `seed` inside; restore them after."""
    own = [] if device.type == "cpu" else [device]
    kind = device.type if own else "cuda"
    with torch.random.fork_rng(own, device_type=kind):
        # Not torch.manual_seed: threads may be drawing from the generators of other devices.
        torch.default_generator.manual_seed(seed)
        for accelerator in own:
            module = torch.get_device_module(accelerator)
            if hasattr(module, "default_generators"):
                module.default_generators[accelerator.index or 0].manual_seed(seed)
            else:
                module.manual_seed(seed)
        yield


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    r"""Return :math:`m \circ \delta / (1 - p)`, :math:`m_j \sim` Bernoulli(:math:`1 - p`).

    DARE: Yu et al. 2024, "Language Models are Super Mario".

    Args:
        delta: any shape and floating dtype.
        density: :math:`1 - p` in (0, 1], the probability of keeping an entry; with 1 nothing is
            drawn.
        generator: draws on its own device, one number for each entry in order.

    Returns:
        a new tensor in float32 (float64 for float64), expectation `delta`. NaN and infinity come
        out as NaN where they are dropped.
    """
    scaled = delta.to(compute_dtype([delta]), copy=True)
    if density == 1.0:
        return scaled
    drawn = torch.rand(delta.shape, generator=generator, device=generator.device)
    return scaled.div_(density).mul_((drawn < density).to(delta.device))
