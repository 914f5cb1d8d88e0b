"""``mergekit-ext merge CONFIG OUT``: mergekit-yaml with every check, and events."""

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import mergekit_ext
from mergekit_ext.cli.options import events_option, merging
from mergekit_ext.core.commands import pushing
from mergekit_ext.errors import ConfigError, RankError
from mergekit_ext.events import JsonLines
from mergekit_ext.parallel import Ranks, launched


@functools.partial(merging, shared=True)
@events_option
@pushing
@click.option("--keep-solution", metavar="FOLDER", help="Keep what lore solves for in a folder")
@click.option("--restart", is_flag=True, help="Start over where an earlier merge was stopped")
def merge(merge_options: Any, config_file: Path, out_path: Path, **options: Any) -> None:
    """Merge models as CONFIG_FILE says, into the folder OUT_PATH.

    Takes every merge method and every flag of mergekit-yaml. The configuration and the headers of
    the inputs are checked first; the output appears when it is complete. Where the same merge was
    stopped before, it goes on. Several processes, started with torchrun or accelerate launch,
    share the work.
    """
    with launched() as together, _only_main_prints(together):
        events, run = options.pop("events"), options.pop("function", mergekit_ext.merge)
        callbacks = [JsonLines(events, "--events")] if events and together.is_main else []
        result = run(config_file, out_path, merge_options, callbacks=callbacks, **options)
        if result.url:
            click.echo(f"Uploaded: {result.url}")


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
