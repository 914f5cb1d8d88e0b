"""``mergekit-pytorch``: merges of single files, checked, measured and staged like the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_ext.events import MergeBegin
from mergekit_ext.host import session as sessions
from mergekit_ext.host.adapters.loader import file_with_adapter, set_up_files
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.merge import check_flat, check_flat_adapters
from mergekit_ext.host.commands import for_commands, parsed
from mergekit_ext.host.method import ext_method
from mergekit_ext.host.run import require
from mergekit_ext.host.tasks import MergeTensorTask, with_statistics
from mergekit_ext.io.documents import text_of
from mergekit_ext.io.headers import allowing_pickles
from mergekit_ext.io.staging import place_problems


def extended_plan(
    stock: Callable[..., Any],
    config: Any,
    out_path: str,
    tensor_union: bool,
    tensor_intersection: bool,
    options: Any,
) -> list[Any]:
    """Extend ``plan_flat_merge``: checks before, statistics after."""
    session = sessions.current()
    set_up_files(options)
    planned = partial(stock, config, out_path, tensor_union, tensor_intersection, options)
    if ext_method(config.merge_method) is None:
        with for_commands(), allowing_pickles(True):
            require(check_flat_adapters(config).problems)
        return list(planned())
    report = check_flat(
        config,
        options,
        union=tensor_union,
        intersection=tensor_intersection,
        source=session.source if session else None,
    )
    files = [part for model in models_at(config) for part in _parts(model)]
    place = session.output if session else out_path
    needed = report.estimate.bytes_written if report.estimate else 0
    require([*report.problems, *place_problems(place, "OUT_PATH", files, needed=needed)])
    *saves, final = planned()
    if session is not None:
        models = tuple(model.model for model in config.models)
        session.emit(MergeBegin(config.merge_method, session.output, models, len(saves)))
    tasks = [MergeTensorTask.of(save.tensor_task, options.random_seed) for save in saves]
    replaced = [
        save.model_copy(update={"tensor_task": task})
        for save, task in zip(saves, with_statistics(tasks, options), strict=True)
    ]
    return [*replaced, final.model_copy(update={"tensor_save_tasks": tuple(replaced)})]


def extended_command(
    stock: Callable[..., Any], config_path: str, out_path: str, **arguments: Any
) -> None:
    """Extend the command's callback: staging and reports for the project's methods."""
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

    with for_commands():
        text = text_of(Path(config_path))
        method = ext_method(parsed(text, RawPyTorchMergeConfig).merge_method)
    if method is None:
        stock(config_path=config_path, out_path=out_path, **arguments)
        return
    given = {name: v for name, v in arguments.items() if name in MergeOptions.model_fields}
    options = MergeOptions(**given)
    with for_commands(), sessions.output(options, out_path, method, (), text) as folder:
        stock(config_path=config_path, out_path=os.fspath(folder), **arguments)


def _parts(model: str) -> list[str]:
    """The file, or the file and its adapter."""
    reference = file_with_adapter(model)
    return [model] if reference is None else [reference.model.path, reference.lora.path]
