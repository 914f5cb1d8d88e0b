"""``mergekit-ext``, in which one process is killed while it merges its third tensor.

The variable VICTIM says which.
"""

from __future__ import annotations

import os
import signal

from mergekit_ext.cli import main
from mergekit_ext.host.tasks import MergeTensorTask

if __name__ == "__main__":
    merges = MergeTensorTask.execute
    begun = []

    def execute(self, *arguments, **named):
        begun.append(self)
        if len(begun) == 3 and os.environ["RANK"] == os.environ["VICTIM"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return merges(self, *arguments, **named)

    MergeTensorTask.execute = execute
    main(prog_name="mergekit-ext")
