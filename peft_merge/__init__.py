"""Exact, base-free merging of LoRA and (IA)^3 adapters."""
