"""What the import hook costs every interpreter start: paired runs with and without it.

python -m bench.startup
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from bench import machine


def start(autoload: str) -> float:
    """Milliseconds of an interpreter that does nothing."""
    environment = {**os.environ, "MERGEKIT_EXT_AUTOLOAD": autoload}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=environment, check=True)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Print the median of the differences of 200 pairs."""
    for _ in range(5):
        start("1")
    pairs = [(start("1"), start("0")) for _ in range(200)]
    difference = statistics.median(a - b for a, b in pairs)
    print(machine.describe())
    print(
        f"with the hook {statistics.median(a for a, _ in pairs):.2f} ms, "
        f"without {statistics.median(b for _, b in pairs):.2f} ms, "
        f"median of the differences {difference:.2f} ms"
    )


if __name__ == "__main__":
    main()
