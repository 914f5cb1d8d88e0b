"""mergekit's options on our subcommands, declared without loading torch or transformers.

``--help`` answers at once; what a command works with is imported when it runs.
"""

import builtins
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from mergekit_ext.core.memory import limited

_OWN = (
    click.Option(["--max-memory"], metavar="SIZE", help="Refuse what would hold more, such as 8GB"),
    click.Option(["--allow-pickle"], is_flag=True, help="Read a pytorch_model.bin that you trust"),
)
# Of mergekit's options those that commands show which write no model.
_SHOWN = frozenset({"allow_crimes", "trust_remote_code", "random_seed", "quiet", "cuda", "device"})
_PATHS = (
    click.argument("out_path", type=click.Path(path_type=Path)),
    click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
)
events_option = click.option(
    "--events",
    type=click.Path(dir_okay=False),
    help="Append what happens to this file, one JSON object a line",
)


@functools.cache
def _declared() -> SimpleNamespace:
    """Return the names of ``mergekit.options``, executed apart with stand-ins for heavy modules.

    Its functions use those modules when a command runs, which the real module does instead; a size
    is left as text.
    """
    spec: Any = importlib.util.find_spec("mergekit.options")
    code = spec.loader.get_code(spec.name)
    heavy = {
        "torch": SimpleNamespace(),
        "transformers": SimpleNamespace(),
        "mergekit.common": SimpleNamespace(parse_kmb=str),
    }

    def find(name: str, *rest: Any) -> Any:
        return heavy.get(name) or __import__(name, *rest)

    own = {**vars(builtins), "__import__": find}
    names: dict[str, Any] = {"__name__": "mergekit.options", "__builtins__": own}
    exec(code, names)
    return SimpleNamespace(**names)


def merging(
    function: Callable[..., str | None],
    *,
    shared: bool = False,
    paths: Sequence[Callable[[Any], Any]] = _PATHS,
) -> Any:
    """Return a subcommand with mergekit's options, and limits that are in force while it runs.

    What `function` returns is what comes next, the last line that the command prints. Several
    processes are refused unless the work is `shared` by them.
    """
    declared = _declared()
    fields = declared.MergeOptions.model_fields

    @functools.wraps(function)
    def run(max_memory: str | None, allow_pickle: bool, **given: Any) -> None:
        from mergekit.options import MergeOptions, ShardSizeParamType

        from mergekit_ext.host.commands import for_commands
        from mergekit_ext.io.headers import allowing_pickles

        context = click.get_current_context()
        size = next(p for p in context.command.params if p.name == "out_shard_size")
        options = {name: given.pop(name) for name in fields if name in given}
        text = options["out_shard_size"]
        options["out_shard_size"] = ShardSizeParamType().convert(text, size, context)
        given["merge_options"] = MergeOptions(**options)
        given["merge_options"].apply_global_options()
        quiet = given["merge_options"].quiet
        with for_commands(shared=shared, quiet=quiet) as done:
            with limited(max_memory), allowing_pickles(allow_pickle):
                following = function(**given)
            if following and not quiet:
                done(given["out_path"], following)

    # mergekit's decorator is given a function of its own: its wrapper would make the stand-in's
    # `MergeOptions`.
    options = declared.add_merge_options(lambda: None).__click_params__
    for option in options:
        option.hidden = not shared and option.name not in _SHOWN
    epilog = None if shared else "All flags of mergekit-yaml are taken; the usual ones are shown."
    command: Any = run
    command.__click_params__ = [*options, *_OWN, *getattr(function, "__click_params__", ())]
    for decorate in (*paths, click.command(cls=declared.PrettyPrintHelp, epilog=epilog)):
        command = decorate(command)
    return command
