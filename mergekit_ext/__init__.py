"""NAN, LoRE-Merging and FlexMerge for mergekit.

After installation mergekit's own commands know the methods. Importing this package loads neither
torch nor mergekit.
"""

# Every Python process of the environment imports this file (see autoload.py): it imports
# nothing, not even `typing` or `__future__`, and its annotations are strings.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mergekit_ext import callbacks as callbacks
    from mergekit_ext import flexmerge as flexmerge
    from mergekit_ext.flexmerge.reader import export as export
    from mergekit_ext.flexmerge.runtime import load as load
    from mergekit_ext.host.catalogue import methods as methods
    from mergekit_ext.host.flexmerge.analyze import analyze as analyze
    from mergekit_ext.host.flexmerge.sizes import sizes as sizes
    from mergekit_ext.host.interface import check as check
    from mergekit_ext.host.interface import decompose as decompose
    from mergekit_ext.host.interface import merge as merge
    from mergekit_ext.host.models import merge_models as merge_models
    from mergekit_ext.host.tune import tune as tune

__version__ = "0.1.0"

# The module of each name; `callbacks` and `flexmerge` are modules themselves.
_HOMES = {
    "analyze": "host.flexmerge.analyze",
    "callbacks": "callbacks",
    "check": "host.interface",
    "decompose": "host.interface",
    "export": "flexmerge.reader",
    "flexmerge": "flexmerge",
    "load": "flexmerge.runtime",
    "merge": "host.interface",
    "merge_models": "host.models",
    "methods": "host.catalogue",
    "sizes": "host.flexmerge.sizes",
    "tune": "host.tune",
}
__all__ = ["__version__", "register", *_HOMES]


def register() -> None:
    """Make the methods known to mergekit, now and for modules of it that are imported later.

    The installed package does this by itself for every process that imports mergekit, unless
    ``MERGEKIT_EXT_AUTOLOAD=0``. Calling it again does no harm, and picks up methods that others
    have registered in the meantime.

    Raises:
        HostVersionError: the installed mergekit is not one that this version works with.
    """
    from mergekit_ext.autoload import install

    install()


if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> "Any":
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"{__name__}.{_HOMES[name]}")
        return getattr(module, name, module)

    def __dir__() -> "list[str]":
        return sorted(__all__)
