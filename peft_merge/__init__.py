"""Exact, base-free merging of LoRA and (IA)^3 adapters, and LoRAs of full fine-tunes."""

from typing import TYPE_CHECKING

from mergekit_ext.late import exported

if TYPE_CHECKING:
    from peft_merge.adapter import Adapter as Adapter
    from peft_merge.adapter import Ia3Adapter as Ia3Adapter
    from peft_merge.adapter import LoraAdapter as LoraAdapter
    from peft_merge.catalogue import methods as methods
    from peft_merge.extraction.run import extract as extract
    from peft_merge.flexmerge.load import load_tasks as load_tasks
    from peft_merge.io.read import load_adapter as load_adapter
    from peft_merge.io.write import save_adapter as save_adapter
    from peft_merge.live import add_merged_adapter as add_merged_adapter
    from peft_merge.merge import MergedAdapter as MergedAdapter
    from peft_merge.merge import check as check
    from peft_merge.merge import merge_adapters as merge_adapters
    from peft_merge.merge import run_config as run_config
    from peft_merge.tuning import tune as tune
else:
    # Loaded when asked for: torch takes a second, and `peft-merge --help` should not.
    __getattr__, __dir__ = exported(
        __name__,
        {
            "adapter": ("Adapter", "Ia3Adapter", "LoraAdapter"),
            "catalogue": ("methods",),
            "extraction.run": ("extract",),
            "flexmerge.load": ("load_tasks",),
            "io.read": ("load_adapter",),
            "io.write": ("save_adapter",),
            "live": ("add_merged_adapter",),
            "merge": ("MergedAdapter", "check", "merge_adapters", "run_config"),
            "tuning": ("tune",),
        },
    )
    __all__ = __dir__()
