"""From kernels to registered merge methods."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit import merge_methods
from mergekit.merge_methods.base import MergeMethod

from mergekit_ext.host.declared import DeclaredMethod
from mergekit_ext.host.flexmerge.method import FlexMergeMethod
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.host.nan_method import NanMethod, takes_nan
from mergekit_ext.methods import MODELS, methods


def register_methods() -> None:
    """Register every method of the project that mergekit does not know yet.

    Methods that others have registered since the last call get their `nan_<method>` too.
    """
    for method in _own():
        _register_once(method)
    for method in merge_methods.registered_methods():
        if takes_nan(method):
            _register_once(NanMethod(method))


def _own() -> Iterator[ExtMethod]:
    yield NanMethod()
    yield FlexMergeMethod()
    yield from map(DeclaredMethod, methods(MODELS).values())


def _register_once(method: MergeMethod) -> None:
    if all(known.spec.name != method.spec.name for known in merge_methods.registered_methods()):
        merge_methods.register(method)
