"""A command that several processes share: one voice, and a device for each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click
from mergekit.options import MergeOptions

from mergekit_ext import ranks
from mergekit_ext.errors import ConfigError, MergekitExtError, Problem, RankError
from mergekit_ext.host.run import for_commands
from mergekit_ext.launch import is_first, launched, launched_size, own_device

# As for click's own usage errors, and for any other failure.
_EXIT_PROBLEMS, _EXIT_FAILURE = 2, 1


@contextmanager
def shared_out(options: MergeOptions) -> Iterator[MergeOptions]:
    """Inside, all processes that were launched work together; yield the options of this one.

    The main process alone shows progress, warnings and what became of the others. They show one
    thing: their own error, if it ended the merge.
    """
    with for_commands(shared=True), _one_voice(), launched() as us:
        us.from_main(lambda: require_shareable(options))
        if us.size == 1:
            yield options
            return
        device = own_device(options.device)
        yield options.model_copy(
            update={"device": device, "quiet": options.quiet or not us.is_main}
        )


def require_shareable(options: MergeOptions) -> None:
    """Refuse flags that several processes cannot all have.

    Raises:
        ConfigError: naming them.
    """
    if ranks.current().size == 1:
        return
    problems = []
    if options.multi_gpu:
        problems.append(
            Problem(
                "--multi-gpu",
                "it (perhaps as --gpu-rich) together with several processes",
                "one of the two",
                "Leave it out, and give --cuda: every process takes a GPU of its own.",
            )
        )
    kind, _, number = options.device.partition(":")
    if number:
        problems.append(
            Problem(
                "--device",
                f"{options.device} for several processes",
                f"{kind}, of which every process takes its own",
            )
        )
    if problems:
        raise ConfigError(problems)


@contextmanager
def _one_voice() -> Iterator[None]:
    """In processes beside the main one: no warnings, no traceback, not the errors of others."""
    if launched_size() == 1 or is_first():
        yield
        return
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (RankError, ConfigError):
            # The main process says it: it hears of errors, and reads the same configuration.
            raise click.exceptions.Exit(_EXIT_PROBLEMS) from None
        except KeyboardInterrupt:
            raise click.exceptions.Exit(_EXIT_FAILURE) from None
        except (MergekitExtError, click.ClickException):
            raise
        except Exception as error:
            click.echo(f"Error: {type(error).__name__}: {error}", err=True)
            raise click.exceptions.Exit(_EXIT_FAILURE) from None
