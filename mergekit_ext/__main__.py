"""``python -m mergekit_ext``: the command ``mergekit-ext``."""

import os

from mergekit_ext.cli import main
from mergekit_ext.core.commands import leave

try:
    main(prog_name="mergekit-ext")
except SystemExit as end:
    # As text: what is wrong with it was the error.
    if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(end.code, int):
        raise
    # Threads of torch that outlive the processes' group can abort the interpreter while it shuts
    # down, and so make a failure of a merge that is finished.
    leave(end.code)
