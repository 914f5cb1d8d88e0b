"""``mergekit-ext sizes CONFIG OUT``: the accuracy-size curve of one or several algorithms."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_ext.core.memory import limited
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import JsonLines, takes
from mergekit_ext.host.commands import for_commands
from mergekit_ext.host.flexmerge.sizes import ALL, write_curve
from mergekit_ext.io.headers import allowing_pickles


@click.command("sizes", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--sizes",
    help="Sizes in models, separated by commas; `all` for the size after every merge "
    "(default: 1, 1.5, and the whole numbers up to that of the models)",
)
@click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    help="Scores a model: called with a transformers module and the name of its task",
)
@click.option(
    "--algorithm",
    "algorithms",
    multiple=True,
    help="An algorithm, one line each (default: that of CONFIG_FILE)",
)
@click.option("--metric", help="The metric that is drawn (default: the first)")
@click.option(
    "--events",
    type=click.Path(dir_okay=False),
    help="Append what happens to this file, one JSON object a line",
)
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin of people you trust")
@click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB")
@add_merge_options  # type: ignore[untyped-decorator]
def sizes(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    sizes: str | None,
    evaluate: str | None,
    algorithms: tuple[str, ...],
    metric: str | None,
    events: str | None,
    max_memory: str | None,
    allow_pickle: bool,
) -> None:
    """Merge a `flexmerge` configuration at many sizes, in memory, and score each.

    Writes sizes.csv and sizes.json, and the plot sizes.png, into the folder OUT_PATH. The inputs
    are analysed once; from one size to the next only the blocks that changed are merged again.
    The `target_size` in CONFIG_FILE is not used, and need not be there.

    FUNCTION gets a module in evaluation mode and a task's name, once for each task's own model
    and once for each task at each size. It returns a number, or a mapping from metrics to numbers
    such as {'accuracy': 0.9}; the higher, the better.
    """
    merge_options.apply_global_options()
    with for_commands(), limited(max_memory), allowing_pickles(allow_pickle):
        write_curve(
            config_file,
            out_path,
            merge_options,
            None if sizes is None else list(map(_size, sizes.split(","))),
            algorithms,
            None if evaluate is None else _function(evaluate),
            metric,
            [JsonLines(events, "--events")] if events else (),
        )


def _size(text: str) -> float | str:
    with suppress(ValueError):
        if text.strip() == ALL or 1 <= float(text) < float("inf"):
            return ALL if text.strip() == ALL else float(text)
    expected = "numbers from 1 and `all`, separated by commas"
    raise ConfigError([Problem("--sizes", repr(text), expected, "Write 1,1.5,2.")])


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if module.endswith(".py") or not all(map(str.isidentifier, [*module.split("."), attribute])):
        expected = "MODULE:FUNCTION, as Python imports them, such as scores:evaluate for scores.py"
        known = f"{Path(module.removesuffix('.py')).name or 'MODULE'}:{attribute or 'FUNCTION'}"
        remedy = f"Write {known}, and run the command in the folder of the module."
        raise ConfigError([Problem("--evaluate", repr(name), expected, remedy)])
    # As for `python -m`: the user's module lies where the command is run.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may come
        name = f"{name} ({type(error).__name__}: {error})"
        expected = "MODULE:FUNCTION, which can be imported from here"
        remedy = "Run the command in the folder of the module, or name that folder in PYTHONPATH."
        raise ConfigError([Problem("--evaluate", name, expected, remedy)]) from None
    if not takes(function, "model", "task"):
        raise ConfigError([Problem("--evaluate", name, "a function of a module and a task")])
    return function
