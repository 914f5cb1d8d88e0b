"""Every use of mergekit that is not public API, and every place where mergekit is changed.

What is changed, and why (each by one function below, called by `autoload` when the module is
loaded):

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
                                at which mergekit's own raises TypeError.
``mergekit.merge``              ``run_merge`` checks, stages and reports merges that use one of the
                                project's methods; other merges go to mergekit's own function,
                                those with adapters checked first. ``_get_donor_model`` takes the
                                files of a model with an adapter from its base; fields with a
                                value for each layer follow the slices (``_model_out_config``).
``mergekit.scripts.multimerge`` the command reads its file as text first, as does ``load_config``:
                                documents are mappings; their names, which become folders, stay in
                                theirs; unknown keys, which pydantic drops, are found.
``mergekit.scripts.merge_raw_pytorch``
                                ``plan_flat_merge`` checks, and runs the statistics graph; the
                                command's output is staged as in ``run_merge``.
                                ``SimpleLoaderCache.get`` and ``SimpleLoadTensor.execute`` read
                                ``file+adapter``; ``TensorDictWrapper.execute`` does not take a
                                path with a plus sign for another model.
``mergekit.scripts.run_yaml``   the command reads its file as text first, so that one that is no
                                YAML, a bomb, or refused by mergekit's schema is one message.
``mergekit.card``               ``is_hf`` does not ask the Hub about a path that exists, while a
                                merge of ours runs (`local_cards`).

Everything is found by its 0.1.5 name, once, here: an import that fails says which version is at
fault.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

from mergekit_ext.errors import HostVersionError

_OLDEST, _TOO_NEW = (0, 1, 5), (0, 2)


def check_version() -> None:
    """Raise `HostVersionError` unless the installed mergekit is 0.1.5 or a later 0.1.x."""
    found = metadata.version("mergekit")
    if not _OLDEST <= Version(found).release < _TOO_NEW:
        raise HostVersionError(
            f"mergekit {found} is installed; mergekit_ext works with mergekit >= 0.1.5, < 0.2. "
            "Install such a version, or set MERGEKIT_EXT_AUTOLOAD=0 to use mergekit without it."
        )


def extend_methods(module: ModuleType) -> None:
    """Register the methods, read models with an adapter, and read sizes of shards.

    The rest is done here because nothing opens a model before this module is loaded, while
    ``mergekit.io.tasks`` itself may be loaded in the middle of modules that the host imports.
    """
    check_version()
    from mergekit.architecture import auto
    from mergekit.io.tasks import LoaderCache, LoadTensor
    from mergekit.options import ShardSizeParamType

    from mergekit_ext.host.adapters import loader
    from mergekit_ext.host.methods import register_methods

    register_methods()
    _replace(auto, "get_model_tensor_names", loader.tensor_names)
    _replace(LoaderCache, "setup", loader.setup)
    _replace(LoaderCache, "get", loader.get)
    _replace(LoadTensor, "execute", loader.load_tensor)
    _replace(ShardSizeParamType, "convert", _reading_sizes)


def _reading_sizes(_: Callable[..., Any]) -> Callable[..., Any]:
    from mergekit_ext.budget import shard_size

    def convert(self: Any, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return shard_size(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)

    return convert


def extend_planner(module: Any) -> None:
    """Put the planner that runs the statistics graph in the place of mergekit's."""
    from mergekit_ext.host import planner

    if module.MergePlanner.__module__ == module.__name__:
        module.MergePlanner = planner.extended(module.MergePlanner)


def extend_merge(module: Any) -> None:
    """Route merges that use the project's methods through `host.run`."""
    from mergekit import plan

    from mergekit_ext.host import out_config, run
    from mergekit_ext.host.adapters import loader

    module.MergePlanner = plan.MergePlanner
    if not hasattr(module.run_merge, "stock"):
        module.run_merge = run.extended(module.run_merge)
    _replace(module, "_get_donor_model", loader.donor)
    _replace(module, "_model_out_config", out_config.following_layers)


def extend_multimerge(module: Any) -> None:
    """Look at the documents of a multi-merge before they are merged."""
    from mergekit_ext.host import run, run_multi, run_yaml

    module.run_merge = run.extended(module.run_merge)
    if not hasattr(module.load_config, "stock"):
        module.load_config = run_multi.checked_load_config(module.load_config)
        module.main.callback = run_yaml.extended_command(module.main.callback, run_multi.check)


def extend_raw_pytorch(module: Any) -> None:
    """Check, measure and stage merges of single files."""
    from mergekit_ext.host import run_flat
    from mergekit_ext.host.adapters import loader

    _replace(module.SimpleLoaderCache, "get", loader.file_loader)
    _replace(module.SimpleLoadTensor, "execute", loader.load_tensor)
    _replace(module.TensorDictWrapper, "execute", loader.by_model)
    if not hasattr(module.plan_flat_merge, "stock"):
        module.plan_flat_merge = run_flat.extended_plan(module.plan_flat_merge)
        module.main.callback = run_flat.extended_command(module.main.callback)


def extend_yaml(module: Any) -> None:
    """Look at the file of ``mergekit-yaml`` before it is parsed."""
    from mergekit_ext.host import run, run_yaml

    if not hasattr(module.main.callback, "stock"):
        module.main.callback = run_yaml.extended_command(module.main.callback, run.parsed)


def replaces(stock: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function that takes the place of mergekit's `stock`, which stays reachable
    as its attribute ``stock``."""
    original = getattr(stock, "stock", stock)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapper: Any = functools.wraps(original)(function)
        wrapper.stock = original
        return wrapper

    return decorate


def _replace(
    owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put what `make` makes of ``owner.name`` in its place, once."""
    current = getattr(owner, name)
    if not hasattr(current, "stock"):
        setattr(owner, name, replaces(current)(make(current)))


def make_executor(targets: Sequence[Any], options: Any) -> Any:
    """The executor that ``run_merge`` would make for `targets` under these options."""
    from mergekit.graph import Executor
    from mergekit.multigpu_executor import MultiGPUExecutor

    if options.multi_gpu:
        return MultiGPUExecutor(
            targets=list(targets), storage_device=None if options.low_cpu_memory else "cpu"
        )
    return Executor(
        targets=list(targets),
        math_device=options.device,
        storage_device=options.device if options.low_cpu_memory else "cpu",
    )


def run_tasks(targets: Sequence[Any], options: Any) -> Iterator[tuple[Any, Any]]:
    """Run `targets` without mergekit's progress bar; yield each with its value, once.

    mergekit's multi-GPU executor may end before it has handed out what its threads put into the
    queue: what is missing is run again.
    """
    from mergekit.graph import Executor

    missing = dict.fromkeys(targets)
    if missing:
        for target, value in make_executor(targets, options).run(quiet=True):
            del missing[target]
            yield target, value
    if missing:
        yield from Executor(list(missing), math_device=options.device).run(quiet=True)


def source_key(task: Any) -> Hashable:
    """What identifies the stored tensors that a merge task reads.

    Two tasks of one merge have the same key if they load the same stored tensors: mergekit plans
    a tied head as a tensor of its own, although it is the embedding that is read.
    """
    loads = []
    pending = [task.gather_tensors]
    while pending:
        part = pending.pop()
        arguments = part.arguments()
        if arguments:
            pending.extend(arguments.values())
        elif hasattr(part, "_resolve_name"):
            from mergekit.io.tasks import LoaderCache

            stored = part._resolve_name(LoaderCache().get(part.model))
            loads.append((str(part.model), stored or part.tensor))
        elif hasattr(part, "tensor_name"):
            loads.append((part.model, part.tensor_name))
    return tuple(sorted(loads))


@contextmanager
def local_cards() -> Iterator[None]:
    """Inside, model cards are written without the Hub.

    Of a local folder called like a repository (``big/base``) mergekit asks the Hub whether there
    is one of that name. The merge has read the folder; and without a network the question raises
    when all the weights are written.
    """
    from mergekit import card

    stock = card.is_hf

    def is_hf(path: str) -> bool:
        return not Path(path).exists() and stock(path)

    card.is_hf = is_hf
    try:
        yield
    finally:
        card.is_hf = stock


def clear_loaders() -> None:
    """Forget open files: mergekit's cache is a class attribute that outlives merges, and a file
    that was replaced in the meantime would be read through its old index."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache().flush_all()
    LoaderCache.loaders.clear()


def ordered(config: Any) -> Any:
    """The same configuration, whose ``referenced_models`` come in the order of the file.

    mergekit returns them in hash order, and takes configuration and tokenizer of a merge without
    a base from the first.
    """
    from mergekit.config import MergeConfiguration

    class OrderedConfiguration(MergeConfiguration):
        def referenced_models(self) -> list[Any]:
            return _models_in_order(self)

    fields = {name: getattr(config, name) for name in type(config).model_fields}
    return OrderedConfiguration.model_construct(_fields_set=config.model_fields_set, **fields)


def _models_in_order(config: Any) -> list[Any]:
    modules = list((config.modules or {}).values())
    slices = [*(config.slices or []), *(s for m in modules for s in m.slices or [])]
    models = [
        *([config.base_model] if config.base_model else []),
        *(m.model for m in config.models or []),
        *(m.model for module in modules for m in module.models or []),
        *(source.model for s in slices for source in s.sources),
    ]
    return list(dict.fromkeys(models))
