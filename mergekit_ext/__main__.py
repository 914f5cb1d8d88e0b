"""``python -m mergekit_ext``: the command ``mergekit-ext``."""

from mergekit_ext.cli import main

main(prog_name="mergekit-ext")
