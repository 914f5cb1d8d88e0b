"""PEFT's combination types, and the methods that they stand for.

PEFT merges factors, or a dense change that it then truncates. What either approximates is a merge
of the changes themselves, and that is what each name means here:

| combination_type | method | what it is |
|---|---|---|
| `linear`, `cat`, `svd` | `linear`, `normalize: false` | sum of w_i D_i |
| `ties`, `ties_svd` | `peft_ties` | PEFT's TIES of the D_i |
| `dare_ties`, `dare_ties_svd` | `peft_dare_ties` | the same, dropping at random |
| `dare_linear`, `dare_linear_svd` | `dare_linear` | sum of w_i times what DARE keeps of D_i |
| `magnitude_prune`, `magnitude_prune_svd` | `magnitude_prune` | the same, keeping the largest |

`cat` was exact already; the rank of its result is now the least that holds it. The others lose the
cross terms of `linear` and of TIES on factors. Random types draw other entries than PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Meaning:
    """A method, the parameters that make it PEFT's, and which of PEFT's arguments it has."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    density: bool = True
    majority: bool = False


_SUM = Meaning("linear", {"normalize": False}, density=False)
_TIES = Meaning("peft_ties", majority=True)
_DARE_TIES = Meaning("peft_dare_ties", majority=True)
_DARE = Meaning("dare_linear", {"normalize": False, "rescale": True})
_PRUNE = Meaning("magnitude_prune", {"normalize": False, "rescale": False})

COMBINATION_TYPES: Mapping[str, Meaning] = {
    "linear": _SUM,
    "cat": _SUM,
    "svd": _SUM,
    "ties": _TIES,
    "ties_svd": _TIES,
    "dare_ties": _DARE_TIES,
    "dare_ties_svd": _DARE_TIES,
    "dare_linear": _DARE,
    "dare_linear_svd": _DARE,
    "magnitude_prune": _PRUNE,
    "magnitude_prune_svd": _PRUNE,
}
