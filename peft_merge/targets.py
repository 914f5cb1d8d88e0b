"""Which modules and parameters a configuration adapts, told by their names as PEFT tells it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Fields that together say which modules are adapted.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_ALL_LINEAR = "all-linear"


class Parameters:
    """What a list of `target_parameters` means.

    An entry ``experts.up`` means the parameter `up` of every module whose name is ``experts`` or
    ends with ``.experts``; an entry without a dot means any module's.
    """

    def __init__(self, entries: Iterable[str] | None):
        self._leaves: dict[str, set[str]] = {}
        for entry in entries or ():
            owner, _, leaf = entry.rpartition(".")
            self._leaves.setdefault(owner, set()).add(leaf)

    def of(self, module: str) -> list[str]:
        """Names of the parameters of `module` that may be meant."""
        if not self._leaves:
            return []
        found = set(self._leaves.get("", ()))
        return sorted(found.union(*(self._leaves.get(end, ()) for end in _ends(module))))


class Targets:
    """What an adapter's configuration selects. Made once for all modules of an adapter."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._chosen = _entries(config.get("target_modules"))
        self._excluded = _entries(config.get("exclude_modules"))
        self._parameters = Parameters(config.get("target_parameters"))

    def parameters(self, module: str) -> list[str]:
        """Names of the parameters of `module` that `target_parameters` may mean.

        A module that is adapted itself has no parameters that are: PEFT refuses both for one.
        """
        found = self._parameters.of(module)
        return [] if found and _matches(self._chosen, module) else found

    def adapt(self, module: str) -> bool:
        """Whether PEFT adapts the module `module` when it loads an adapter of this configuration.

        As PEFT's ``check_target_module_exists`` tells by names, save for `modules_to_save`. Where
        that cannot be told (no `target_modules`, which PEFT then has from a table; "all-linear";
        the two layers that are tied), True.
        """
        chosen, config = self._chosen, self._config
        if config.get("target_modules") is None or config.get("ensure_weight_tying"):
            return True
        if isinstance(chosen, str) and chosen.lower() == _ALL_LINEAR:
            return True
        if self._excluded and _matches(self._excluded, module):
            return False
        if not _matches(chosen, module):
            return False
        layers = config.get("layers_to_transform")
        if isinstance(chosen, str) or module in chosen or layers is None or layers == []:
            return True
        given = config.get("layers_pattern") or []
        given = [given] if isinstance(given, str) else given
        for pattern in [rf"(?:^|.*?\.){each}" for each in given] or [r".*?\.[^.]*"]:
            if (found := re.match(rf"{pattern}\.(?P<idx>\d+)\.", module)) is not None:
                return int(found["idx"]) in (layers if isinstance(layers, list) else [layers])
        return False


def _entries(value: Any) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value or ())


def _matches(chosen: str | frozenset[str], module: str) -> bool:
    """PEFT's rule for expressions and for lists: an entry is a name, or its end after a dot."""
    if isinstance(chosen, str):
        return bool(chosen) and re.fullmatch(chosen, module) is not None
    return any(end in chosen for end in _ends(module))


def _ends(module: str) -> Iterator[str]:
    """A name, and what follows each of its dots."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module
