"""The command ``peft-merge CONFIG OUT``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

# As for click's own usage errors: the input is at fault.
EXIT_PROBLEMS = 2
_LONGEST_WARNING = 10_000


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--check", is_flag=True, help="Say what would be merged, and merge nothing.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, ...")
@click.option("--rank", metavar="RANK", help="Instead of the file's: 16, lossless, or energy=0.99.")
@click.option("--patterns", is_flag=True, help="Ranks by module, which PEFT alone reads.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary.")
@click.option(
    "--jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append what happens to this file, one JSON object a line.",
)
@click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB.")
@click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin of people you trust.")
@click.version_option(package_name="mergekit-ext")
def main(
    config: Path,
    out: Path | None,
    check: bool,
    device: str,
    rank: str | None,
    patterns: bool,
    quiet: bool,
    jsonl: Path | None,
    allow_pickle: bool,
    max_memory: str | None,
) -> None:
    """Merge LoRA or (IA)^3 adapters as the YAML file CONFIG says, into the folder OUT.

    The base model is not needed. OUT is an adapter that PeftModel.from_pretrained loads; it must
    not exist or be empty, and appears when it is complete. The exit code is 2 if something is
    wrong with CONFIG or the adapters.
    """
    if out is None and not check:
        raise click.UsageError("Missing argument 'OUT'. Name a folder, or give --check.")
    # Heavy, and only needed here: `--help` stays fast.
    from mergekit_ext.core.interrupts import prompt
    from mergekit_ext.core.memory import limited
    from mergekit_ext.errors import MergekitExtError
    from mergekit_ext.events import JsonLines, ProgressBar
    from peft_merge.merge import plan_config, run_config
    from peft_merge.report import preview, sentences

    options: dict[str, Any] = {
        "device": device,
        "rank": rank,
        "patterns": patterns or None,
        "allow_pickle": allow_pickle,
    }
    with warnings.catch_warnings():
        warnings.showwarning = _show
        try:
            with prompt(), limited(max_memory):
                if check:
                    click.echo(preview(plan_config(config, out, **options)))
                    return
                lines = [JsonLines(jsonl, "--jsonl")] if jsonl else []
                bars = [] if quiet else [ProgressBar()]
                result = run_config(config, out or "", callbacks=[*bars, *lines], **options)
        except MergekitExtError as error:
            click.echo(f"Error: {error}", err=True)
            raise click.exceptions.Exit(EXIT_PROBLEMS) from None
    if not quiet:
        click.echo("\n".join([*sentences(result.report), f"Written: {out}"]))


def _show(message: Any, *_: Any, **__: Any) -> None:
    from mergekit_ext.errors import printable

    print(f"Warning: {printable(str(message), _LONGEST_WARNING)}", file=sys.stderr)
