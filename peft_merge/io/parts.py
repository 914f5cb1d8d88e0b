"""Whether a module has the tensors that it needs."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ext.errors import Problem
from mergekit_ext.io.headers import TensorHeader
from peft_merge.io.tensors import DTYPES


def complete(
    module: str,
    parts: Mapping[str, TensorHeader],
    wanted: list[str],
    where: str,
    found: list[Problem],
) -> bool:
    """Whether `parts` are those `wanted` and floating-point numbers; otherwise it is a problem."""
    missing = [part for part in wanted if part not in parts]
    extra = [part for part in parts if part not in wanted]
    wrong = [part for part, header in parts.items() if header.dtype not in DTYPES]
    if missing or extra:
        text = [f"no {part}" for part in missing] + [
            f"{part}, which has no place" for part in extra
        ]
        found.append(
            Problem(
                f"{where}: {module}",
                " and ".join(text),
                f"{', '.join(wanted)}, as its configuration says",
                "Save the adapter again with PEFT's save_pretrained.",
            )
        )
    if wrong:
        found.append(
            Problem(
                f"{where}: {module}",
                f"{wrong[0]} of dtype {parts[wrong[0]].dtype}",
                f"one of {', '.join(DTYPES)}",
                "Save the adapter in a floating-point dtype.",
            )
        )
    return not (missing or extra or wrong)
