"""The options beside the parameters: rank, space, dtype, device, seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch

from mergekit_ext.core.wording import did_you_mean, listing, shown
from mergekit_ext.errors import Problem
from peft_merge import ia3
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.algebra.spaces import SPACES
from peft_merge.config.plan import Kind

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_ENERGY = re.compile(r"\{?\s*energy\s*[:=]\s*([\d.]+)\s*\}?", re.IGNORECASE)
_RANK = "a whole number from 1, `lossless`, or {energy: 0.99}"


def rank_problem(rank: Any) -> Problem | None:
    """What is wrong with a rank that was given."""
    if isinstance(rank, Mapping):
        energy = rank.get("energy")
        number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
        if set(rank) == {"energy"} and number and 0 < float(energy or 0) <= 1:
            return None
        expected = f"{_RANK}, with a share above 0 up to 1"
        return Problem("rank", shown(dict(rank)), expected)
    if rank == "lossless" or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        return None
    remedy = ""
    if isinstance(rank, str):
        remedy = _meant(rank) or did_you_mean(rank, ["lossless"], listed=True)
    return Problem("rank", shown(rank), _RANK, remedy)


def _meant(text: str) -> str:
    """What a rank that is text should look like, if it holds a number."""
    if (energy := _ENERGY.fullmatch(text)) is not None:
        return f"Write {{energy: {energy[1]}}}."
    try:
        number = float(text)
    except ValueError:
        return ""
    if not number.is_integer() or number < 1:
        return ""
    said = "" if text.isdecimal() else f"YAML reads {text} as text, not as a number. "
    return f"{said}Write {number:.0f}."


def dtype_of(name: Any) -> torch.dtype | Problem:
    """The dtype that a user names; torch's own objects and names are taken too."""
    if isinstance(name, torch.dtype) and name in _DTYPES.values():
        return name
    text = name.removeprefix("torch.") if isinstance(name, str) else None
    if text in _DTYPES:
        return _DTYPES[text]
    remedy = did_you_mean(text, _DTYPES, listed=True) if text else ""
    return Problem("dtype", shown(name), f"one of {', '.join(_DTYPES)}", remedy)


def device_of(name: Any) -> torch.device | Problem:
    """The device that a user names, if it can be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend has its own way to say that it is not there
        reason = (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(".")
        found = f"{name}, which cannot be used ({reason or type(error).__name__})"
        return Problem("device", found, "a device that is here, such as cpu")
    return device


def seed_problem(seed: Any) -> Problem | None:
    """Seeds are whole numbers from 0 that torch's generators take."""
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63:
        return None
    return Problem("seed", shown(seed), "a whole number from 0, below 2^63")


_NAMES: dict[Kind, tuple[str, ...]] = {
    "lora": tuple(SPACES),
    "ia3": get_args(ia3.Space),
}


def default_space(kind: Kind) -> str:
    """Where every method is what its definition says."""
    return _NAMES[kind][0]


def space_problems(space: Any, kind: Kind, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """What is wrong with a space that was given."""
    names = _NAMES[kind]
    if not isinstance(space, str) or space not in names:
        title = "LoRA" if kind == "lora" else "(IA)^3"
        remedy = did_you_mean(space, names, listed=True)
        yield Problem("space", shown(space), f"for {title} one of {', '.join(names)}", remedy)
    elif space == "factors":
        yield from _equal_ranks(adapters)


def _equal_ranks(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    ranks: dict[str, set[int]] = {}
    for adapter in adapters:
        if isinstance(adapter, LoraAdapter):
            for module, info in adapter.infos.items():
                ranks.setdefault(module, set()).add(info.rank)
    unequal = [module for module, found in ranks.items() if len(found) > 1]
    if unequal:
        found = f"factors, with different ranks in {listing(unequal)}"
        yield Problem("space", found, "equal ranks, to merge factors", "Use `space: delta`.")
