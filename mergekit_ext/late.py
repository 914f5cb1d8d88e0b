"""Import late what packages export, and what modules of mergekit name and seldom use.

While a module of `autoload._LATE` is executed, its own import statements bind a stand-in
for each object listed; the object is imported when the stand-in is called or asked for an
attribute. Other modules, other threads and `sys.modules` never see a stand-in, and a module that
is loaded by the end of the execution takes the place of its stand-in.
``MERGEKIT_EXT_LATE_IMPORTS=0`` switches this off.
"""

import builtins
import importlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

_lock = threading.Lock()
_stock = builtins.__import__
# The modules that are being executed, with their late objects.
_executing: dict[str, Mapping[str, Collection[str]]] = {}


def exported(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose modules are imported when asked for.

    `homes` has the names that each of its modules is asked for.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home)


class Late:
    """Stands for a module, or for an object of it, which is imported when it is used."""

    _module = _name = ""  # of a copy that is not complete yet

    def __init__(self, module: str, name: str = "") -> None:
        vars(self).update(_module=module, _name=name)

    def _found(self) -> Any:
        module = importlib.import_module(self._module)
        return getattr(module, self._name) if self._name else module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._found(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._found(), name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._found()(*arguments, **options)


def _import(
    name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> Any:
    late = _executing.get((globals or {}).get("__name__", ""), {}).get(name, ())
    if fromlist and set(fromlist) <= set(late):
        return SimpleNamespace(**{item: Late(name, item) for item in fromlist})
    if fromlist or "" not in late:
        return _stock(name, globals, locals, fromlist, level)
    module = Late(name)
    vars(module).update({item: Late(name, item) for item in late if item})
    return module


@contextmanager
def late_imports(module: Any, late: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Bind stand-ins for the objects of `late` in `module`, which is executed inside."""
    global _stock
    if os.environ.get("MERGEKIT_EXT_LATE_IMPORTS") == "0":
        yield
        return
    with _lock:
        if not _executing:
            _stock, builtins.__import__ = builtins.__import__, _import
        _executing[module.__name__] = late
    try:
        yield
    finally:
        with _lock:
            del _executing[module.__name__]
            if not _executing:
                builtins.__import__ = _stock
    for key, value in [*vars(module).items()]:
        if type(value) is Late and not value._name and value._module in sys.modules:
            setattr(module, key, value._found())
