"""``mergekit-ext sizes CONFIG OUT``: the accuracy-size curve of one or several algorithms."""

from pathlib import Path
from typing import Any

import click

import mergekit_ext
from mergekit_ext.cli.options import events_option, merging
from mergekit_ext.events import JsonLines
from mergekit_ext.search import function_named


@merging
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
@events_option
def sizes(merge_options: Any, config_file: Path, out_path: Path, **given: Any) -> str:
    """Merge a `flexmerge` configuration at many sizes, in memory, and score each.

    Writes sizes.csv and sizes.json, and the plot sizes.png, into the folder OUT_PATH. The inputs
    are analysed once; from one size to the next only the blocks that changed are merged again.
    The `target_size` in CONFIG_FILE is not used, and need not be there.

    FUNCTION gets a module in evaluation mode and a task's name, once for each task's own model
    and once for each task at each size. It returns a number, or a mapping from metrics to numbers
    such as {'accuracy': 0.9}; the higher, the better.
    """
    if (sizes := given.pop("sizes")) is not None:
        given["sizes"] = sizes.split(",")
    if evaluate := given.pop("evaluate"):
        given["evaluate"] = function_named(evaluate, "--evaluate", "a module", "a task")
    if events := given.pop("events"):
        given["callbacks"] = [JsonLines(events, "--events")]
    curve = mergekit_ext.sizes(config_file, out_path, merge_options, **given)
    for note in curve.notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(str(curve))
    several = len({point.algorithm for point in curve.points}) > 1
    chosen = "one of these sizes as `target_size`" + " and its `algorithm`" * several
    return f"mergekit-yaml {config_file} OUT, with {chosen}"
