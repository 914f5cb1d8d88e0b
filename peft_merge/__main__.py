"""``python -m peft_merge``: the command ``peft-merge``."""

from peft_merge.cli import main

main(prog_name="peft-merge")
