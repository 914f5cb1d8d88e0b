"""Every place where mergekit is changed; imported by `autoload` alone.

One function for each module, which `autoload` calls when that module is loaded, changes this:

``mergekit.merge_methods``      the methods are registered; and models with an adapter are read
                                with the adapter applied (`host.adapters`):
                                ``LoaderCache.setup`` and ``get``, ``LoadTensor.execute``, and
                                ``get_model_tensor_names`` for architectures without a table.
                                ``MERGEKIT_EXT_ADAPTERS=0`` leaves them to mergekit. In commands
                                that load it, ``--out-shard-size`` also takes 8MB and 5GiB, and
                                what is no size is one message (``ShardSizeParamType.convert``).
``mergekit.plan``               ``MergePlanner`` becomes a subclass of it (`host.planner`) that
                                runs the statistics graph before it hands out the merge graph,
                                and plans optional tensors with aliases (``BertModel`` has one),
                                at which mergekit's own raises TypeError. In a merge that can be
                                continued ``TensorWriterTask.execute`` gives the planned files.
``mergekit.merge``              ``run_merge`` checks, stages and reports merges that use one of the
                                project's methods; other merges go to mergekit's own function,
                                those with adapters checked first. ``_get_donor_model`` takes the
                                files of a model with an adapter from its base; fields with a
                                value for each layer follow the slices (``_model_out_config``). The
                                card does not ask the Hub about a path that exists (``is_hf``).
``mergekit.scripts.multimerge`` the command reads its file as text first, as does ``load_config``:
                                documents are mappings; their names, which become folders, stay in
                                theirs; unknown keys, which pydantic drops, are found.
``mergekit.scripts.merge_raw_pytorch``
                                ``plan_flat_merge`` checks, and runs the statistics graph; the
                                command's errors are messages.
``mergekit.scripts.run_yaml``   the command reads its file as text first, so that one that is no
                                YAML, an alias bomb, or refused by mergekit's schema is one message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from mergekit_ext.errors import HostVersionError

_OLDEST, _TOO_NEW = (0, 1, 5), (0, 2)


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


def extend_methods(merge_methods: Any) -> None:
    """Register the methods; and whatever else is there before a model is opened.

    ``mergekit.io.tasks`` itself may be loaded in the middle of modules that the host imports.
    Methods that others have registered since the last call get their `nan_<method>` too.
    """
    check_version()
    from mergekit.architecture import auto
    from mergekit.io.tasks import LoaderCache, LoadTensor
    from mergekit.options import ShardSizeParamType

    from mergekit_ext.host.adapters import loader
    from mergekit_ext.host.flexmerge import FlexMergeMethod
    from mergekit_ext.host.method import DeclaredMethod
    from mergekit_ext.host.nan_method import NanMethod, takes_nan
    from mergekit_ext.methods import MODELS, methods

    def register(methods: Iterable[Any]) -> None:
        known = {method.spec.name for method in merge_methods.registered_methods()}
        for method in methods:
            if method.spec.name not in known:
                merge_methods.register(method)

    register([NanMethod(), FlexMergeMethod(), *map(DeclaredMethod, methods(MODELS).values())])
    register([NanMethod(other) for other in merge_methods.registered_methods() if takes_nan(other)])
    _replace(auto, "get_model_tensor_names", loader.tensor_names)
    _replace(LoaderCache, "setup", loader.setup)
    _replace(LoaderCache, "get", loader.get)
    _replace(LoadTensor, "execute", loader.load_tensor)
    _replace(ShardSizeParamType, "convert", _read_size)


def _read_size(_: Callable[..., Any], kind: Any, value: Any, param: Any, ctx: Any) -> Any:
    from mergekit_ext.core.memory import shard_size

    try:
        return shard_size(value)
    except ValueError as error:
        return kind.fail(str(error), param, ctx)


def extend_planner(module: Any) -> None:
    """Put the planner that runs the statistics graph in the place of mergekit's, and its writer."""
    from mergekit.io.tasks import TensorWriterTask

    from mergekit_ext.host import planner

    _replace(TensorWriterTask, "execute", planner.writer)
    if module.MergePlanner.__module__ == module.__name__:
        module.MergePlanner = planner.extended(module.MergePlanner)


def extend_merge(module: Any) -> None:
    """Route merges that use the project's methods through `host.run`."""
    from mergekit import card, plan

    from mergekit_ext.host import out_config, run
    from mergekit_ext.host.adapters import loader

    # Without a network the question raises, when all the weights are written.
    _replace(card, "is_hf", lambda stock, path: not Path(path).exists() and stock(path))
    module.MergePlanner = plan.MergePlanner
    _replace(module, "run_merge", run.extended)
    _replace(module, "_get_donor_model", loader.donor)
    _replace(module, "_model_out_config", out_config.following_layers)


def extend_multimerge(module: Any) -> None:
    """Look at the documents of a multi-merge before they are merged."""
    from mergekit_ext.host import commands, run

    _replace(module, "run_merge", run.extended)
    _replace(module, "load_config", commands.load_config)
    _replace(module.main, "callback", commands.reading_first(commands.require_merges))


def extend_raw_pytorch(module: Any) -> None:
    """Check and measure merges of single files."""
    from mergekit_ext.host import flat

    _replace(module, "plan_flat_merge", flat.extended_plan)
    _replace(module.main, "callback", flat.extended_command)


def extend_yaml(module: Any) -> None:
    """Look at the file of ``mergekit-yaml`` before it is parsed."""
    from mergekit_ext.host import commands

    _replace(module.main, "callback", commands.reading_first(commands.parsed))
