"""The options beside the parameters: rank, patterns, space, dtype, device, seed, base model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from mergekit_ext.errors import Problem, did_you_mean, listing, shown
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter
from peft_merge.algebra.spaces import SPACES
from peft_merge.config.document import Request
from peft_merge.config.plan import Kind
from peft_merge.modules import VECTOR_SPACES, log_problems

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_ENERGY = re.compile(r"\{?\s*energy\s*[:=]\s*([\d.]+)\s*\}?", re.IGNORECASE)
_RANK = "a whole number from 1, `lossless`, or {energy: 0.99}"
# The first is the default: every method is there what its definition says.
_SPACES: dict[Kind, tuple[str, ...]] = {"lora": tuple(SPACES), "ia3": VECTOR_SPACES}


def default_space(kind: Kind) -> str:
    """Return the space in which every method is what its definition says."""
    return _SPACES[kind][0]


def option_problems(request: Request) -> Iterator[Problem]:
    """Yield what is wrong with options whatever the adapters are."""
    if request.rank is not None:
        yield from _rank_problems(request.rank)
    if request.patterns not in (None, True, False):
        yield Problem("patterns", shown(request.patterns), "true or false")
    if (wrong := seed_problem(request.seed)) is not None:
        yield wrong
    if request.base_model is not None and not isinstance(request.base_model, str):
        expected = "a model's name, which goes into the card and adapter_config.json"
        yield Problem("base_model", shown(request.base_model), expected)


def fit_problems(request: Request, kind: Kind, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what is wrong with rank and space for these adapters."""
    space, rank, names = request.space, request.rank, _SPACES[kind]
    if space is not None and (not isinstance(space, str) or space not in names):
        title = "LoRA" if kind == "lora" else "(IA)^3"
        remedy = did_you_mean(space, names, listed=True)
        yield Problem("space", shown(space), f"for {title} one of {', '.join(names)}", remedy)
    loras = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter)]
    infos = [item for adapter in loras for item in adapter.infos.items()]
    if space == "factors" and loras:
        ranks: dict[str, set[int]] = {}
        for module, info in infos:
            ranks.setdefault(module, set()).add(info.rank)
        if unequal := [module for module, found in ranks.items() if len(found) > 1]:
            found_text = f"factors, with different ranks in {listing(unequal)}"
            expected = "equal ranks, to merge factors"
            yield Problem("space", found_text, expected, "Use `space: delta`.")
    if kind == "ia3":
        for name, value in (("rank", rank), ("patterns", request.patterns)):
            if value is not None:
                expected = "none: (IA)^3 vectors have no rank"
                yield Problem(name, shown(value), expected, "Take it out.")
        if space == "log":
            yield from log_problems([a for a in adapters if isinstance(a, Ia3Adapter)])
    elif isinstance(rank, int):
        possible = max(min(info.rows, info.columns) for _, info in infos)
        if rank > possible:
            expected = f"at most {possible}, the smaller side of the largest module"
            yield Problem("rank", shown(rank), expected)


def _rank_problems(rank: Any) -> Iterator[Problem]:
    if isinstance(rank, Mapping):
        energy = rank.get("energy")
        number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
        if not (set(rank) == {"energy"} and number and 0 < float(energy or 0) <= 1):
            yield Problem("rank", shown(dict(rank)), f"{_RANK}, with a share above 0 up to 1")
    elif rank != "lossless" and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        remedy = ""
        if isinstance(rank, str):
            remedy = _meant(rank) or did_you_mean(rank, ["lossless"], listed=True)
        yield Problem("rank", shown(rank), _RANK, remedy)


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
    why = "" if text.isdecimal() else f"YAML reads {text} as text, not as a number. "
    return f"{why}Write {number:.0f}."


def seed_problem(seed: Any) -> Problem | None:
    """Return what is wrong with a seed: a whole number from 0 that torch's generators take."""
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63:
        return None
    return Problem("seed", shown(seed), "a whole number from 0, below 2^63")


def dtype_of(name: Any) -> torch.dtype | Problem:
    """Return the dtype of a name; torch's own objects and names are taken too."""
    text = str(name).removeprefix("torch.") if isinstance(name, (str, torch.dtype)) else ""
    if text in _DTYPES:
        return _DTYPES[text]
    remedy = did_you_mean(text, _DTYPES, listed=True) if text else ""
    return Problem("dtype", shown(name), f"one of {', '.join(_DTYPES)}", remedy)


def common_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype of all adapters, or the smallest that holds the values of each."""
    dtypes = (info.dtype for adapter in adapters for info in adapter.infos.values())
    return reduce(torch.promote_types, dtypes)


def device_of(name: Any) -> torch.device | Problem:
    """Return the device of a name, if it can be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend raises errors of its own where it is not there
        reason = (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(".")
        found = f"{name}, which cannot be used ({reason or type(error).__name__})"
        return Problem("device", found, "a device that is here, such as cpu")
    return device
