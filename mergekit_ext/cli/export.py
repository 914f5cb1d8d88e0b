"""``mergekit-ext export PATH TASK OUT``: one task of a FlexMerge checkpoint, ordinary."""

from pathlib import Path

import click

import mergekit_ext
from mergekit_ext.core.commands import reporting
from mergekit_ext.parallel import require_one


@click.command("export")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("task")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--no-verify", is_flag=True, help="Do not compare the files with their digests.")
def export(path: Path, task: str, out: Path, no_verify: bool) -> None:
    """Write one TASK of the FlexMerge checkpoint in the folder PATH as an ordinary model.

    OUT is a folder that does not exist or is empty. It gets the weights, reconstructed where the
    checkpoint holds masks or residuals, and the task's configuration and tokenizer. The exit code
    is 2 if something is wrong with the checkpoint or with OUT.
    """
    with reporting() as done:
        if require_one(click.get_current_context().command_path):
            mergekit_ext.export(path, task, out, verify=not no_verify)
            done(out, f'from_pretrained("{out}"), in transformers')
