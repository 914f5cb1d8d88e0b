"""Whether models' weights may be pickles: only where they are asked for.

A pickle is a program. torch's restricted unpickler, which reads them here, runs no calls but those
that make tensors; that it has no holes is what is trusted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "MERGEKIT_EXT_ALLOW_PICKLE"
FOUND = "a pickle, which may run any code when it is read"
EXPECTED = "safetensors"
REMEDY = (
    "Ask for safetensors; or, if you trust its author, give --allow-pickle (in Python "
    f"allow_pickle, for mergekit's own commands {VARIABLE}=1): only tensors are read from it."
)

_asked: ContextVar[bool] = ContextVar("allow_pickle", default=False)


@contextmanager
def allowed(asked: bool) -> Iterator[None]:
    """Inside, checks take pickles if `asked`; otherwise nothing changes."""
    token = _asked.set(_asked.get() or asked)
    try:
        yield
    finally:
        _asked.reset(token)


def are_allowed() -> bool:
    """Whether they are asked for, here or in the environment."""
    return _asked.get() or os.environ.get(VARIABLE) == "1"
