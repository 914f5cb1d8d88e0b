"""``mergekit-ext decompose CONFIG OUT``: one base, and what each model adds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_ext.cli.merge import merge


def _decompose(config_file: Path, **given: Any) -> None:
    """Make one base of fine-tunes and a LoRA of each, as CONFIG_FILE says.

    OUT_PATH gets the folder `base`, an ordinary model, and a PEFT LoRA for each task; with
    `output: checkpoint` a FlexMerge checkpoint. The file is that of a merge with `merge_method:
    decompose`; everything else is as for `merge`.
    """
    from mergekit_ext.host.commands import for_commands, require_decomposition
    from mergekit_ext.io.documents import text_of

    with for_commands(shared=True):
        require_decomposition(text_of(config_file))
    merge.callback(config_file=config_file, **given)


decompose = type(merge)(
    "decompose", params=merge.params, callback=_decompose, help=_decompose.__doc__
)
