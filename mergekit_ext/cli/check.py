"""``mergekit-ext check``: what is wrong with a configuration, and what the merge will cost."""

from __future__ import annotations

import dataclasses
import json
from typing import IO, TYPE_CHECKING, Any

import click

from mergekit_ext.core.memory import limited, shard_size, size
from mergekit_ext.errors import numbered, printable

if TYPE_CHECKING:
    from mergekit_ext.host.checks.report import CheckReport


@click.command("check")
@click.argument("config", type=click.File(encoding="utf-8"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--allow-crimes", is_flag=True, help="Allow different architectures.")
@click.option(
    "--unsafe-truncate-embeddings", is_flag=True, help="Cut vocabularies to the smallest."
)
@click.option("--trust-remote-code", is_flag=True, help="Let models run their own code.")
@click.option("--transformers-cache", metavar="DIR", help="Where downloaded models are.")
@click.option("--lora-merge-cache", metavar="DIR", help="Used with MERGEKIT_EXT_ADAPTERS=0 only.")
@click.option("--lora-merge-dtype", metavar="DTYPE", help="In which dtype adapters are merged.")
@click.option(
    "--out-shard-size", metavar="SIZE", default="5B", show_default=True, help="Bytes of one shard."
)
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin of people you trust.")
@click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB.")
@click.option("--tensor-union", "-u", is_flag=True, help="As for mergekit-pytorch.")
@click.option("--tensor-intersection", "-i", is_flag=True, help="As for mergekit-pytorch.")
def check(
    config: IO[str],
    as_json: bool,
    out_shard_size: str,
    max_memory: str | None,
    allow_pickle: bool,
    tensor_union: bool,
    tensor_intersection: bool,
    **flags: Any,
) -> None:
    """Check the merge that CONFIG describes without reading any weight.

    CONFIG is a YAML file for mergekit-yaml, mergekit-multi or mergekit-pytorch, or - for standard
    input. Give the flags that the merge will be given. The exit code is 0 if the merge can start
    and 2 if something is wrong.
    """
    # Heavy, and only needed here: `--help` stays fast.
    from mergekit.options import MergeOptions

    from mergekit_ext.host.checks.merge import check_source
    from mergekit_ext.host.commands import for_commands
    from mergekit_ext.io.headers import allowing_pickles

    try:
        largest = shard_size(out_shard_size)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--out-shard-size") from None
    try:
        text = config.read()
    except ValueError as error:
        found = f"found {config.name}, which cannot be read ({error}); expected YAML in UTF-8"
        raise click.BadParameter(found, param_hint="CONFIG") from None
    with for_commands(), limited(max_memory), allowing_pickles(allow_pickle):
        reports = check_source(
            text,
            MergeOptions(out_shard_size=largest, **flags),
            union=tensor_union,
            intersection=tensor_intersection,
        )
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
