"""``mergekit-ext check``: what is wrong with a configuration, and what the merge will cost."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import IO, TYPE_CHECKING

import click

from mergekit_ext.cli.options import merging
from mergekit_ext.core.memory import size
from mergekit_ext.errors import numbered, printable

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_ext.host.checks.report import CheckReport

_CONFIG = click.argument("config", type=click.File(encoding="utf-8"))


@functools.partial(merging, paths=[_CONFIG])
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def check(merge_options: MergeOptions, config: IO[str], as_json: bool) -> None:
    """Check the merge that CONFIG describes without reading any weight.

    CONFIG is a YAML file for mergekit-yaml or mergekit-multi, or - for standard input. Give the
    flags that the merge will be given. The exit code is 0 if the merge can start and 2 if
    something is wrong.
    """
    from mergekit_ext.host.checks.merge import check_source

    try:
        text = config.read()
    except ValueError as error:
        found = f"found {config.name}, which cannot be read ({error}); expected YAML in UTF-8"
        raise click.BadParameter(found, param_hint="CONFIG") from None
    reports = check_source(text, merge_options)
    if as_json:
        documents = [{"name": name, **dataclasses.asdict(report)} for name, report in reports]
        click.echo(json.dumps({"documents": documents}, indent=2))
    else:
        click.echo("\n\n".join(_as_text(name, report) for name, report in reports))
    if any(report.problems for _, report in reports):
        raise click.exceptions.Exit(2)  # as for click's own usage errors


def _as_text(name: str | None, report: CheckReport) -> str:
    lines = [f"{printable(name)}:"] if name is not None else []
    count = len(report.problems)
    if count:
        lines.append(f"{count} problem{'s' if count != 1 else ''}:")
        lines += numbered(report.problems)
    else:
        lines.append("No problems.")
    if cost := report.estimate:
        lines += [
            f"Output:        {cost.tensors:,} tensors, {cost.parameters:,} parameters",
            f"Bytes read:    {size(cost.bytes_read)}",
            f"Bytes written: {size(cost.bytes_written)}",
            f"Bytes held:    {size(cost.bytes_held)} at most, estimated",
        ]
    if report.notes:
        lines.append("Notes:")
        lines += [f"  - {printable(note)}" for note in report.notes]
    return "\n".join(lines)
