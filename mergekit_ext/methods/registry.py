"""The methods by the names that they have in YAML."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from mergekit_ext.methods.method import Method

_METHODS: dict[tuple[str, str], Method] = {}
_NO_METHODS = {"method", "registry"}


def register(method: Method) -> Method:
    """Add a method for each of its drivers.

    Raises:
        ValueError: a driver has a method of this name already.
    """
    keys = [(driver, method.name) for driver in sorted(method.drivers)]
    for key in keys:
        if key in _METHODS:
            raise ValueError(f"{method.name}: {key[0]} have a merge method of this name already")
    _METHODS.update(dict.fromkeys(keys, method))
    return method


def methods(driver: str) -> Mapping[str, Method]:
    """Return the methods that a driver offers, those of the project included."""
    _load()
    return {name: method for (owner, name), method in _METHODS.items() if owner == driver}


@cache
def _load() -> None:
    package = importlib.import_module("mergekit_ext.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _NO_METHODS:
            importlib.import_module(f"{package.__name__}.{module.name}")
