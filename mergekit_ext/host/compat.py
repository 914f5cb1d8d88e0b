"""Uses of mergekit that are not public API; `patches` lists what is changed in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
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
