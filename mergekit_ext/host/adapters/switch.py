"""Whether adapters are applied while reading, or by mergekit's own way."""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "MERGEKIT_EXT_ADAPTERS"


def applies(reference: Any) -> bool:
    """Whether `reference`, a `ModelReference`, has an adapter that is applied while reading."""
    return reference.lora is not None and os.environ.get(VARIABLE) != "0"
