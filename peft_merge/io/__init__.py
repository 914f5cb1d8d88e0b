"""Adapters in and out: folders, the Hub, live models."""

from peft_merge.io.read import load_adapter, load_adapters

__all__ = ["load_adapter", "load_adapters"]
