"""Adapters in and out: folders, the Hub, live models."""

from peft_merge.io.compatible import DifferentBasesWarning, FewSharedModulesWarning
from peft_merge.io.read import adapters_of, load_adapter
from peft_merge.io.write import save_adapter, state_dict

__all__ = [
    "DifferentBasesWarning",
    "FewSharedModulesWarning",
    "adapters_of",
    "load_adapter",
    "save_adapter",
    "state_dict",
]
