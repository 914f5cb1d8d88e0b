"""``mergekit-ext methods [NAME]``: what each method takes, and when to use it."""

import click

import mergekit_ext


@click.command("methods")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """Show all merge methods, or of one NAME its parameters and a YAML that runs.

    Algorithms of FlexMerge are called flexmerge:ties, and so on.
    """
    from mergekit_ext.host.commands import for_commands  # heavy: `--help` stays fast

    with for_commands():
        click.echo(str(mergekit_ext.methods(name)))
