"""``mergekit-pytorch`` with the project's methods: checked and measured, then left to mergekit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_ext.host import session as sessions
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.merge import check_flat
from mergekit_ext.host.commands import for_commands, parsed
from mergekit_ext.host.method import ext_method
from mergekit_ext.host.run import require
from mergekit_ext.host.tasks import MergeTensorTask, with_statistics
from mergekit_ext.io.documents import text_of
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
    planned = partial(stock, config, out_path, tensor_union, tensor_intersection, options)
    if ext_method(config.merge_method) is None:
        return list(planned())
    session = sessions.current()
    report = check_flat(
        config,
        options,
        union=tensor_union,
        intersection=tensor_intersection,
        source=session.source if session else None,
    )
    require([*report.problems, *place_problems(out_path, "OUT_PATH", models_at(config))])
    *saves, final = planned()
    tasks = [MergeTensorTask.of(save.tensor_task, options.random_seed) for save in saves]
    replaced = tuple(
        save.model_copy(update={"tensor_task": task})
        for save, task in zip(saves, with_statistics(tasks, options), strict=True)
    )
    return [*replaced, final.model_copy(update={"tensor_save_tasks": replaced})]


def extended_command(stock: Callable[..., Any], config_path: str, **arguments: Any) -> None:
    """Extend the command's callback: an error is a message, and warnings come once."""
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

    with for_commands():
        text = text_of(Path(config_path))
        method = ext_method(parsed(text, RawPyTorchMergeConfig).merge_method)
        with sessions.active(sessions.Session(source=text)) as session:
            stock(config_path=config_path, **arguments)
        if method is not None:
            session.warn(method.warnings(session.records))
