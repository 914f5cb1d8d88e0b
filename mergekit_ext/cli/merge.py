"""``mergekit-ext merge CONFIG OUT``: mergekit-yaml with every check, and events."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

import mergekit_ext
from mergekit_ext.core.memory import limited
from mergekit_ext.errors import ConfigError, RankError
from mergekit_ext.events import JsonLines
from mergekit_ext.host.commands import for_commands
from mergekit_ext.io.headers import allowing_pickles
from mergekit_ext.parallel import Ranks, launched

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    add_merge_options,
    click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB"),
    click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin of people you trust"),
)
_PATHS = (
    click.argument("out_path", type=click.Path(path_type=Path)),
    click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
)
events_option = click.option(
    "--events",
    type=click.Path(dir_okay=False),
    help="Append what happens to this file, one JSON object a line",
)


def merging(
    function: Callable[..., None],
    *,
    shared: bool = False,
    paths: Sequence[Callable[[Any], Any]] = _PATHS,
) -> Any:
    """Return a subcommand with mergekit's options, and limits that are in force while it runs.

    Several processes are refused unless the work is `shared` by them.
    """

    @functools.wraps(function)
    def run(max_memory: str | None, allow_pickle: bool, **given: Any) -> None:
        given["merge_options"].apply_global_options()
        with for_commands(shared=shared), limited(max_memory), allowing_pickles(allow_pickle):
            function(**given)

    command: Any = run
    for decorate in (*_OPTIONS, *paths, click.command(cls=PrettyPrintHelp)):
        command = decorate(command)
    return command


@functools.partial(merging, shared=True)
@events_option
@click.option("--restart", is_flag=True, help="Start over where an earlier merge was stopped")
def merge(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    events: str | None,
    restart: bool,
) -> None:
    """Merge models as CONFIG_FILE says, into the folder OUT_PATH.

    Takes every merge method and every flag of mergekit-yaml. The configuration and the headers of
    the inputs are checked first; the output appears when it is complete. Where the same merge was
    stopped before, it goes on. Several processes, started with torchrun or accelerate launch,
    share the work.
    """
    with launched() as together, _only_main_prints(together):
        callbacks = [JsonLines(events, "--events")] if events and together.is_main else []
        mergekit_ext.merge(
            config_file, out_path, merge_options, callbacks=callbacks, restart=restart
        )


@contextmanager
def _only_main_prints(together: Ranks) -> Iterator[None]:
    """Keep processes beside the main one silent, except for an error that only they find."""
    if together.is_main:
        yield
        return
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                yield
            except ConfigError:
                # If the main process finds the same, it ends with it: this process is silent then.
                together.part()
                raise
        except RankError:
            raise click.exceptions.Exit(2) from None
