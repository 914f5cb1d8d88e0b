"""Merging a study's adapters: by the command ``peft-merge``, and by PEFT itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent / "configs"
EQUAL_RANK = 8  # that of each adapter, and what PEFT's SVD types give by default
DENSITY = 0.3

_ORDER = ["linear", "linear_log", "task_arithmetic", "task_arithmetic_log"]


@dataclass(frozen=True)
class PeftCall:
    """Arguments of PEFT's `add_weighted_adapter`; `weight` of every adapter, None for the mean."""

    weight: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


_SVD = {"svd_rank": EQUAL_RANK}
_TIES = {"combination_type": "ties_svd", "density": DENSITY, **_SVD}
_LORA_CALLS = {
    "PEFT svd, rank 8": PeftCall(None, {"combination_type": "svd", **_SVD}),
    "PEFT linear": PeftCall(None, {"combination_type": "linear"}),
    "PEFT ties_svd, rank 8": PeftCall(1.0, _TIES),
}
PEFT_CALLS: Mapping[str, Mapping[str, PeftCall]] = {
    "language_lora": _LORA_CALLS,
    "encoder_lora": _LORA_CALLS,
    "encoder_ia3": {"PEFT, mean": PeftCall(), "PEFT, weights 0.4": PeftCall(0.4)},
}


def available(study: str) -> list[str]:
    """The names of a study's YAML files, in the order of the table."""
    names = [path.stem for path in (CONFIGS / study).glob("*.yml")]
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else 99, name))


def by_command(out: Path, study: str, config: str) -> tuple[Path, float]:
    """``peft-merge``; the merged folder, and the seconds that it gives, with reading and writing.

    The command runs in the folder of the adapters, because the YAML files name ``./<adapter>``.
    """
    target = Path("merged") / config
    program = Path(sysconfig.get_path("scripts")) / "peft-merge"
    source = CONFIGS / study / f"{config}.yml"
    with tempfile.TemporaryDirectory() as scratch:
        events = Path(scratch) / "events.jsonl"
        done = subprocess.run(
            [sys.executable, program, source, target, "--quiet", "--jsonl", events],
            cwd=out / study,
            env={"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"peft-merge failed on {study}/{config}.yml:\n{done.stderr}")
        end = json.loads(events.read_text(encoding="utf-8").splitlines()[-1])
    return out / study / target, float(end["seconds"])


def loaded(base: Any, folder: Path) -> Any:
    """An adapter folder on its base, as anybody loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


def by_peft(base: Any, folders: Mapping[str, Path], call: PeftCall) -> tuple[Any, float]:
    """PEFT's own merge in a live model, active; and how many seconds it took."""
    from peft import PeftModel

    names = list(folders)
    model = PeftModel.from_pretrained(base, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    weight = 1 / len(names) if call.weight is None else call.weight
    started = time.perf_counter()
    model.add_weighted_adapter(names, [weight] * len(names), "merged", **call.options)
    seconds = time.perf_counter() - started
    model.set_adapter("merged")
    return model.eval(), seconds
