"""``mergekit-ext decompose CONFIG OUT``: one base, and what each model adds to it."""

from typing import Any

import mergekit_ext
from mergekit_ext.cli.merge import merge


def _decompose(**given: Any) -> None:
    """Make one base of fine-tunes and a LoRA of each, as CONFIG_FILE says.

    OUT_PATH gets the folder `base`, an ordinary model, and a PEFT LoRA for each task; with
    `output: checkpoint` a FlexMerge checkpoint. The file is that of a merge with `merge_method:
    decompose`; everything else is as for `merge`.
    """
    merge.callback(function=mergekit_ext.decompose, **given)


decompose = type(merge)(
    "decompose", params=merge.params, callback=_decompose, help=_decompose.__doc__
)
