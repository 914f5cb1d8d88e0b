"""Adapters in and out: folders, the Hub, live models."""

from peft_merge.io.compatible import (
    DifferentBasesWarning,
    FewSharedModulesWarning,
    compatible,
    different_bases,
    few_shared,
)
from peft_merge.io.forms import one_form
from peft_merge.io.merged import merged_ia3, merged_lora
from peft_merge.io.read import adapters_of, load_adapter
from peft_merge.io.write import save_adapter, state_dict

__all__ = [
    "DifferentBasesWarning",
    "FewSharedModulesWarning",
    "adapters_of",
    "compatible",
    "different_bases",
    "few_shared",
    "load_adapter",
    "merged_ia3",
    "merged_lora",
    "one_form",
    "save_adapter",
    "state_dict",
]
