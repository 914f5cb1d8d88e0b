"""FlexMerge's own parameters, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_ext.methods import Method
from peft_merge.flexmerge.target import Target


@dataclass(frozen=True)
class Options:
    """How groups are found, and merged."""

    target: Target
    rule: Method
    linkage: str
    order: str
    granularity: str

    def described(self) -> dict[str, Any]:
        """As the manifest and the report show them."""
        return {
            "algorithm": self.rule.name,
            "target_size": str(self.target),
            "linkage": self.linkage,
            "order": self.order,
            "granularity": self.granularity,
        }
