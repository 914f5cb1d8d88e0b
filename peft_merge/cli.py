"""The commands ``peft-merge CONFIG OUT`` and ``peft-merge extract BASE MODEL OUT``."""

from pathlib import Path
from typing import Any

import click

from mergekit_ext.core.commands import Commands, pushing, reporting, searching

_DEVICE = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, ..."
)
_QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary.")
_JSONL = click.option(
    "--jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append what happens to this file, one JSON object a line.",
)
_ALLOW_PICKLE = click.option(
    "--allow-pickle", is_flag=True, help="Read adapter_model.bin of people you trust."
)


class _Commands(Commands):
    """A group whose first argument may be that of ``merge``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A word that names no file is a command, misspelt.
        others = {*self.commands, "--help", "--version"}
        if args and args[0] not in others and (Path(args[0]).exists() or not args[0].isalpha()):
            args = ["merge", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Commands)
@click.version_option(package_name="mergekit-ext")
def main() -> None:
    """Work with LoRA and (IA)^3 adapters.

    `peft-merge CONFIG OUT` merges: `merge` may be left out. A CONFIG that is called like a command
    is given as ./CONFIG.
    """


@main.command("merge")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--check", is_flag=True, help="Say what would be merged, and merge nothing.")
@_DEVICE
@click.option("--rank", metavar="RANK", help="Instead of the file's: 16, lossless, or energy=0.99.")
@click.option("--patterns", is_flag=True, default=None, help="Ranks by module, for PEFT and vLLM.")
@_QUIET
@_JSONL
@click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB.")
@_ALLOW_PICKLE
@pushing
def merge(config: Path, out: Path | None, check: bool, quiet: bool, **options: Any) -> None:
    """Merge LoRA or (IA)^3 adapters as the YAML file CONFIG says, into the folder OUT.

    The base model is not needed. OUT is an adapter that PeftModel.from_pretrained loads; it must
    not exist or be empty, and appears when it is complete. The exit code is 2 if something is
    wrong with CONFIG or the adapters.
    """
    if out is None and not check:
        raise click.UsageError("Missing argument 'OUT'. Name a folder, or give --check.")
    # Heavy, and only needed here: `--help` stays fast.
    from mergekit_ext.core.memory import limited
    from mergekit_ext.io.class_model import without_bars
    from peft_merge.merge import check as checked
    from peft_merge.merge import run_config
    from peft_merge.report import sentences

    jsonl, most = options.pop("jsonl"), options.pop("max_memory")
    with reporting() as done, limited(most), without_bars(quiet):
        if check:
            click.echo(str(checked(config, out, **options)))
            click.echo(f"Next: peft-merge {config} OUT", err=True)
            return
        result = run_config(config, out or "", callbacks=_callbacks(quiet, jsonl), **options)
        if not quiet:
            click.echo("\n".join(sentences(result.report)))
            done(out, f"load it as {out}/README.md shows")
        if result.url:
            click.echo(f"Uploaded: {result.url}")


@main.command("extract")
@click.argument("base")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="Of every matrix.")
@click.option("--energy", type=float, help="The share of the squared norm that is kept: 0.9.")
@click.option("--size", metavar="SIZE", help="Of the adapter: 50MB, or 0.05 of MODEL.")
@click.option("--vectors", default="base", show_default=True, help="Small tensors: own or base.")
@_DEVICE
@_QUIET
@_JSONL
def extract(base: str, model: str, out: Path, quiet: bool, jsonl: Any, **options: Any) -> None:
    """Make a LoRA of the full fine-tune MODEL of the model BASE, in the folder OUT.

    BASE and MODEL are folders, or names on the Hub. One of --rank, --energy and --size says how
    much is kept of the difference of each matrix. OUT is an adapter that
    PeftModel.from_pretrained loads; it must not exist or be empty, and appears when it is complete.
    The exit code is 2 if something is wrong with the models.
    """
    from mergekit_ext.io.class_model import without_bars
    from peft_merge.extraction.run import extract as run
    from peft_merge.report import sentences

    with reporting() as done, without_bars(quiet):
        result = run(base, model, out, callbacks=_callbacks(quiet, jsonl), **options)
        if not quiet:
            click.echo("\n".join(sentences(result.report)))
            done(out, f"load it as {out}/README.md shows")


@main.command("tune")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@searching
@click.option("--model", metavar="MODULE:FUNCTION", required=True, help="Returns the base model.")
@_DEVICE
@_QUIET
@_ALLOW_PICKLE
def tune(config: Path, out: Path, evaluate: str, model: str, **options: Any) -> None:
    """Search for the values that CONFIG leaves open, such as `scale: {from: 0.1, to: 2}`.

    --evaluate gets a PeftModel with a merged adapter, and the name of an input. OUT gets best.yml,
    tables, a plot, and the study with which the same command goes on.
    """
    from mergekit_ext.io.class_model import without_bars
    from mergekit_ext.search import function_named
    from peft_merge.tuning import tune as run

    with reporting() as done, without_bars(options["quiet"]):
        function = function_named(evaluate, "--evaluate", "a model", "a task")
        found = run(config, out, function, function_named(model, "--model"), **options)
        click.echo(f"{found.score:.4f}: {out / 'best.yml'}")
        if not options["quiet"]:
            done(out, f"peft-merge {out / 'best.yml'} OUT")


@main.command("methods")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """Show all merge methods, or of one NAME its parameters and a YAML that runs."""
    from peft_merge.catalogue import methods as found

    with reporting():
        click.echo(str(found(name)))


def _callbacks(quiet: bool, jsonl: Path | None) -> list[Any]:
    from mergekit_ext.events import JsonLines, ProgressBar

    lines = [JsonLines(jsonl, "--jsonl")] if jsonl else []
    return [*([] if quiet else [ProgressBar()]), *lines]
