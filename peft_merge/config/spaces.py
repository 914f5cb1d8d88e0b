"""Which spaces there are for which adapters and methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from mergekit_ext.core.wording import did_you_mean, listing, shown
from mergekit_ext.errors import Problem
from peft_merge import ia3
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.algebra.spaces import SPACES
from peft_merge.config.plan import Kind

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
