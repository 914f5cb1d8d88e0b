"""``python -m mergekit_ext``: the command ``mergekit-ext``."""

import os
import sys

from mergekit_ext.cli import main
from mergekit_ext.launch import launched_size

try:
    main(prog_name="mergekit-ext")
except SystemExit as end:
    if launched_size() == 1 or not isinstance(end.code, int):
        raise
    # Threads of torch that outlive the processes' group can abort the interpreter while it shuts
    # down, and so make a failure of a merge that is finished.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code)
