"""The modules of an (IA)^3, from its configuration and the headers of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_ext.errors import Problem
from mergekit_ext.io.headers import TensorHeader
from peft_merge.adapter import VectorInfo
from peft_merge.io.parts import complete
from peft_merge.io.tensors import DTYPES, VECTOR


def vectors(
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, TensorHeader]],
    where: str,
    found: list[Problem],
) -> Iterator[tuple[str, VectorInfo]]:
    """Each module with what is known of its vector; those that are wrong become problems.

    Whether a vector multiplies inputs or outputs is told by `feedforward_modules` and by its shape,
    which must agree. Arguments as for `peft_merge.io.factors.factors`.
    """
    chosen = config.get("feedforward_modules")
    for module, parts in modules.items():
        if not complete(module, parts, [VECTOR], where, found):
            continue
        header = parts[VECTOR]
        shape = header.shape
        by_shape = {
            feedforward
            for feedforward, axis in ((True, 1), (False, 0 if len(shape) == 2 else 1))
            if len(shape) > 1 and shape[axis] > 0 and _is_vector(shape, axis)
        }
        if chosen is None:
            possible = by_shape
        elif isinstance(chosen, str):
            possible = by_shape & {bool(re.fullmatch(chosen, module))}
        else:
            possible = by_shape & {module.endswith(tuple(chosen))}
        if len(possible) != 1:
            found.append(
                Problem(
                    f"{where}: {module}.{VECTOR}",
                    f"shape {list(shape)} with feedforward_modules {chosen!r}",
                    "(1, in) for a feedforward module, (out, 1) for another, (1, channels, 1, ...)"
                    " for a convolution",
                    "Restore the adapter_config.json that was saved with these tensors.",
                )
            )
            continue
        yield module, VectorInfo(shape, possible.pop(), DTYPES[header.dtype])


def _is_vector(shape: tuple[int, ...], axis: int) -> bool:
    """Whether all axes but one have length 1."""
    return all(length == 1 for place, length in enumerate(shape) if place != axis)
