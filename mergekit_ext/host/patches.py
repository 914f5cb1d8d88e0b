"""Every place where mergekit is changed; imported by `autoload` alone.

`autoload` calls one function for each module of mergekit when that module is loaded.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from mergekit_ext.errors import HostVersionError

_OLDEST, _TOO_NEW = (0, 1, 5), (0, 2)

_registered: list[Any] = []  # what was, after the last registration


def _replace(owner: Any, name: str, extension: Callable[..., Any]) -> None:
    """Have ``owner.name`` call `extension`, which gets mergekit's own first; once."""
    stock = getattr(owner, name)
    if hasattr(stock, "stock"):
        return

    @functools.wraps(stock)
    def extended(*arguments: Any, **options: Any) -> Any:
        return extension(stock, *arguments, **options)

    extended.stock = stock  # type: ignore[attr-defined]
    setattr(owner, name, extended)


def check_version() -> None:
    """Raise `HostVersionError` unless the installed mergekit is 0.1.5 or a later 0.1.x."""
    found = metadata.version("mergekit")
    if not _OLDEST <= Version(found).release < _TOO_NEW:
        raise HostVersionError(
            f"mergekit {found} is installed; mergekit_ext works with mergekit >= 0.1.5, < 0.2. "
            "Install such a version, or set MERGEKIT_EXT_AUTOLOAD=0 to use mergekit without it."
        )


def extend_inference(auto: Any) -> None:
    """``mergekit.architecture.auto``: an architecture is inferred from names with the adapter."""
    from mergekit_ext.host.adapters import loader

    _replace(auto, "get_model_tensor_names", loader.tensor_names)


def extend_methods(merge_methods: Any) -> None:
    """``mergekit.merge_methods``: register the methods; apply adapters where models are read.

    Methods that others have registered since the last call get their `nan_<method>` too.
    ``--out-shard-size`` also takes 8MB and 5GiB, and what is no size is one message.
    """
    check_version()
    from mergekit.io.tasks import LoaderCache, LoadTensor
    from mergekit.options import ShardSizeParamType

    from mergekit_ext.declared import MODELS, methods
    from mergekit_ext.host.adapters import loader
    from mergekit_ext.host.flexmerge import DECOMPOSITION, FLEXMERGE, FlexMergeMethod
    from mergekit_ext.host.method import DeclaredMethod
    from mergekit_ext.host.nan_method import NanMethod, takes_nan

    def register(methods: Iterable[Any]) -> None:
        known = {method.spec.name for method in merge_methods.registered_methods()}
        for method in methods:
            if method.spec.name not in known:
                merge_methods.register(method)

    if [*merge_methods.registered_methods()] != _registered:  # making them takes a while
        register([NanMethod(), *map(FlexMergeMethod, (FLEXMERGE, DECOMPOSITION))])
        register(map(DeclaredMethod, methods(MODELS).values()))
        others = merge_methods.registered_methods()
        register([NanMethod(other) for other in others if takes_nan(other)])
        _registered[:] = merge_methods.registered_methods()
    _replace(LoaderCache, "setup", loader.setup)
    _replace(LoaderCache, "get", loader.get)
    _replace(LoadTensor, "execute", loader.load_tensor)
    _replace(ShardSizeParamType, "convert", _read_size)
    if (auto := sys.modules.get("mergekit.architecture.auto")) is not None:
        extend_inference(auto)


def _read_size(_: Callable[..., Any], kind: Any, value: Any, param: Any, ctx: Any) -> Any:
    from mergekit_ext.core.memory import shard_size

    try:
        return shard_size(value)
    except ValueError as error:
        return kind.fail(str(error), param, ctx)


def extend_planner(module: Any) -> None:
    """``mergekit.plan``: the planner runs the statistics graph, and writes planned files.

    It plans optional tensors with aliases (of ``BertModel``), at which mergekit's raises TypeError.
    Configurations name their models in the order of the file; in mergekit it is that of hashes.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import TensorWriterTask

    from mergekit_ext.host import inputs, planner

    _replace(MergeConfiguration, "referenced_models", inputs.in_order)
    _replace(TensorWriterTask, "execute", planner.writer)
    if module.MergePlanner.__module__ == module.__name__:
        module.MergePlanner = planner.extended(module.MergePlanner)


def extend_merge(module: Any) -> None:
    """``mergekit.merge``: merges with the project's methods are checked, staged and reported.

    Others are left to mergekit, those with adapters checked first. What mergekit has no table for,
    or one that does not fit, is planned by the names in the files. Tokenizers of a model with an
    adapter are its base's; fields with a value for each layer follow the slices.
    """
    from mergekit import card, plan

    from mergekit_ext.host import architecture, out_config, run
    from mergekit_ext.host.adapters import loader

    # Without a network the question raises, when all the weights are written.
    _replace(card, "is_hf", lambda stock, path: not Path(path).exists() and stock(path))
    module.MergePlanner = plan.MergePlanner
    _replace(module, "run_merge", run.extended)
    _replace(module, "get_architecture_info", architecture.chosen)
    _replace(module, "_get_donor_model", loader.donor)
    _replace(module, "_model_out_config", out_config.following_layers)


def extend_multimerge(module: Any) -> None:
    """``mergekit.scripts.multimerge``: the file is read as text first.

    Documents are mappings with keys that are known, and their names, which become folders, stay in
    theirs.
    """
    from mergekit_ext.host import commands, run

    _replace(module, "run_merge", run.extended)
    _replace(module.main, "callback", commands.reading_first(commands.require_merges))


def extend_yaml(module: Any) -> None:
    """``mergekit.scripts.run_yaml``: what is no configuration is one message."""
    from mergekit_ext.host import commands

    _replace(module.main, "callback", commands.reading_first(commands.parsed))
