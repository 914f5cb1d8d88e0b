"""``mergekit-ext check``: what is wrong with a configuration, and what the merge will cost."""

import dataclasses
import functools
import json
from typing import IO, Any

import click

import mergekit_ext
from mergekit_ext.cli.options import merging
from mergekit_ext.io.documents import read

_CONFIG = click.argument("config", type=click.File(encoding="utf-8"))


@functools.partial(merging, paths=[_CONFIG])
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def check(merge_options: Any, config: IO[str], as_json: bool) -> None:
    """Check the merge that CONFIG describes without reading any weight.

    CONFIG is a YAML file for mergekit-yaml or mergekit-multi, or - for standard input. Give the
    flags that the merge will be given. The exit code is 0 if the merge can start and 2 if
    something is wrong.
    """
    try:
        text = config.read()
    except ValueError as error:
        wrong = f"found {config.name}, which cannot be read ({error}); expected YAML in UTF-8"
        raise click.BadParameter(wrong, param_hint="CONFIG") from None
    found = mergekit_ext.check(f"{text}\n", merge_options)  # a text has two lines at least
    documents = [{"name": name, **dataclasses.asdict(report)} for name, report in found.documents]
    click.echo(json.dumps({"documents": documents}, indent=2) if as_json else str(found))
    if found.problems:
        raise click.exceptions.Exit(2)  # as for click's own usage errors
    if not as_json:
        command = "mergekit-yaml" if len(documents) == 1 else "mergekit-multi"
        if [document["merge_method"] for document in read(text)[0]] == ["decompose"]:
            command = "mergekit-ext decompose"
        click.echo(f"Next: {command} {config.name} OUT", err=True)
