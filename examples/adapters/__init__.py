"""LoRA and (IA)^3 adapters, trained on the spot, merged by ``peft-merge`` and scored."""
