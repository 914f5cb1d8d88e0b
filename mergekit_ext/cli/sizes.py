"""``mergekit-ext sizes CONFIG OUT``: the accuracy-size curve of one or several algorithms."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_ext.core.memory import limited
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import JsonLines, takes
from mergekit_ext.host.commands import for_commands
from mergekit_ext.io.headers import allowing_pickles


@click.command("sizes", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@click.argument("out_path", type=click.Path(file_okay=False))
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
    config_file: str,
    out_path: str,
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
    from mergekit_ext.host.flexmerge.curve_files import write_curve

    merge_options.apply_global_options()
    try:
        callbacks = [JsonLines(events)] if events else []
    except OSError as error:
        raise click.BadParameter(f"{events}: {error.strerror}", param_hint="--events") from None
    with for_commands(), limited(max_memory), allowing_pickles(allow_pickle):
        write_curve(
            Path(config_file),
            Path(out_path),
            merge_options,
            None if sizes is None else _sizes(sizes),
            algorithms,
            _function(evaluate),
            metric,
            callbacks,
        )


def _sizes(text: str) -> list[float | str]:
    found: list[float | str] = []
    for item in text.split(","):
        try:
            number = float(item)
        except ValueError:
            number = 0.0
        if item.strip() != "all" and not 1 <= number < float("inf"):
            expected = "numbers from 1 and `all`, separated by commas"
            raise ConfigError([Problem("--sizes", repr(item), expected, "Write 1,1.5,2.")])
        found.append("all" if item.strip() == "all" else number)
    return found


def _function(name: str | None) -> Callable[..., Any] | None:
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    names = (*module.split("."), attribute)
    if module.endswith(".py") or not all(part.isidentifier() for part in names):
        raise ConfigError([_no_function(name, module, attribute)])
    # As for `python -m`: the user's module lies where the command is run.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may come
        name = f"{name} ({type(error).__name__}: {error})"
        expected = "MODULE:FUNCTION, which can be imported from here"
        remedy = "Run the command in the folder of the module, or name that folder in PYTHONPATH."
        raise ConfigError([Problem("--evaluate", name, expected, remedy)]) from None
    if not takes(function, "model", "task"):
        raise ConfigError([Problem("--evaluate", name, "a function of a module and a task")])
    found: Callable[..., Any] = function
    return found


def _no_function(name: str, module: str, attribute: str) -> Problem:
    """Most often the path of a file, or a module alone."""
    expected = "MODULE:FUNCTION, as Python imports them, such as scores:evaluate for scores.py"
    file = Path(module.removesuffix(".py"))
    if not file.name.isidentifier():
        return Problem("--evaluate", repr(name), expected, "Write the module and its function.")
    remedy = f"Write {file.name}:{attribute or 'FUNCTION'}"
    if len(file.parts) > 1:
        remedy += f", and run the command in {file.parent}"
    return Problem("--evaluate", repr(name), expected, f"{remedy}.")
