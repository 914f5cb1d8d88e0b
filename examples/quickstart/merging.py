"""Running the ordinary ``mergekit-yaml`` command on the YAML files of this example."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"


def available_methods() -> list[str]:
    """The names of the YAML files, in the order of the table: simple methods first."""
    order = ["linear", "task_arithmetic", "ties", "nan", "nan_ties", "lore"]
    names = [path.stem for path in CONFIGS.glob("*.yml")]
    return sorted(names, key=lambda name: (order.index(name) if name in order else 99, name))


def mergekit_yaml() -> Path:
    """The ``mergekit-yaml`` that belongs to the Python that runs this program."""
    scripts = Path(sysconfig.get_path("scripts"))
    for name in ("mergekit-yaml", "mergekit-yaml.exe"):
        if (scripts / name).is_file():
            return scripts / name
    raise FileNotFoundError(f"mergekit-yaml is not in {scripts}; install mergekit-ext there")


def merge(method: str, folder: Path, extra: Sequence[str] = ()) -> Path:
    """Merge ``folder``/models as ``configs/<method>.yml`` says; return the merged checkpoint.

    The command runs in ``folder`` because the YAML files name ``./models/<task>``.
    """
    target = folder / "merged" / method
    config = CONFIGS / f"{method}.yml"
    relative = Path("merged") / method
    # There is no tokenizer to copy: these are vision models.
    command = [mergekit_yaml(), config, relative, "--no-copy-tokenizer", "--quiet", *extra]
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"},  # tensors are tiny
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"mergekit-yaml failed on {config} (exit status {result.returncode}):\n{result.stderr}"
        )
    return target
