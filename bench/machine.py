"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util
from pathlib import Path

import torch


def describe() -> str:
    """One line about processor, memory, accelerator and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2] for line in info.read_text().splitlines()]
        keys = [line.partition(":")[0].strip() for line in info.read_text().splitlines()]
        model = next(
            (n.strip() for k, n in zip(keys, names, strict=True) if k == "model name"), model
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    there = filter(util.find_spec, ("torch", "mergekit"))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in there)
    return (
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, accelerator {accelerator}; "
        f"Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads"
    )
