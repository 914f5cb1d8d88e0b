"""A full fine-tune of a known base as an ordinary LoRA."""
