"""How far merges over a base went: rho, and a warning; see `kernels.calibration`."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mergekit_ext.errors import OvershootWarning
from mergekit_ext.report.card import range_of

# Of one tensor, block or module: norms ``merged`` and ``inputs`` by name, ``factor`` and its value,
# and ``usual``, the rho that is not too large.
Distance = Mapping[str, Any]
_ROUNDING = 1e-3  # of the output


def rho(distances: Iterable[Distance]) -> dict[str, float]:
    """Return merged norms over the ``mean`` and the ``largest`` of the inputs', taken together.

    Tensors with the same inputs are one vector, those with others come beside it.
    """
    sets: dict[tuple[str, ...], list[Distance]] = {}
    for each in distances:
        sets.setdefault(tuple(each["inputs"]), []).append(each)
    norms = [
        [math.hypot(*(each["inputs"][name] for each in found)) for name in names]
        for names, found in sets.items()
    ]
    merged = math.hypot(*(each["merged"] for found in sets.values() for each in found))
    mean, largest = math.hypot(*map(fmean, norms)), math.hypot(*map(max, norms))
    return {"mean": merged / mean, "largest": merged / largest}


@dataclass(frozen=True)
class Rho:
    """How far one merge went: `rho` of the ``model`` and of ``blocks``; empty for no distances."""

    found: Mapping[str, Any]
    distances: Collection[Distance] = ()

    @property
    def stored(self) -> dict[str, Any]:
        """Return what a report holds of it: nothing for no distances."""
        return {"rho": self.found} if self.found else {}

    @property
    def line(self) -> str:
        """Return a sentence for the user; empty if there is nothing to say."""
        if not self.found:
            return ""
        whole, each = self.found["model"], [b["mean"] for b in self.found["blocks"].values()]
        what = "the norm of the merged task vector over the mean of its inputs'"
        besides = f"{whole['largest']:.3g} over the largest; {range_of(each)} by block"
        return f"rho {whole['mean']:.3g}: {what} ({besides})."

    def warnings(self, method: str) -> list[OvershootWarning]:
        """Return a warning if the model went further than usual, with the factor for that."""
        usual = max((each["usual"] for each in self.distances), default=math.inf)
        if not self.found or (mean := self.found["model"]["mean"]) <= usual * (1 + _ROUNDING):
            return []
        factors = {pair for each in self.distances for pair in each["factor"].items()}
        name, value = next(iter(factors), ("weight", 0.0))
        remedy = f"`{name}` times {usual / mean:.3g}"
        if len(factors) == 1:
            remedy = f"`{name}: {value * usual / mean:.3g}` in place of {value:.3g}"
        text = (
            f"{method}: the merged task vector is {mean:.3g} times as long as its inputs' are on "
            f"average (rho). Beyond {usual:.3g} merges mostly go too far; {remedy} brings it there."
        )
        return [OvershootWarning(text)]


def rho_of(reports: Mapping[str, Mapping[str, Any]], group: Callable[[str], str]) -> Rho:
    """Return how far a merge went, from what it reports of its parts, and the block of each."""
    distances = {name: each["distance"] for name, each in reports.items() if "distance" in each}
    parts: dict[str, list[Distance]] = {}
    for name, each in distances.items():
        parts.setdefault(group(name), []).append(each)
    if not parts:
        return Rho({})
    blocks = {name: rho(part) for name, part in parts.items()}
    return Rho({"model": rho(distances.values()), "blocks": blocks}, distances.values())
