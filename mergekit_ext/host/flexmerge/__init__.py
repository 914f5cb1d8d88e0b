"""`merge_method: flexmerge`: from mergekit's configuration to the FlexMerge engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, MergeMethodSpec, TensorGroup

from mergekit_ext.declared import Merged, Method
from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.plan import PAPER, TITLE, USE
from mergekit_ext.host.method import PLAIN, ExtMethod

DECOMPOSE = "decompose"
FLEXMERGE = replace(PLAIN, name="flexmerge", title=TITLE, paper=PAPER, use=USE)
# `flexmerge` with ``algorithm: residual`` under a name of its own, and adapters by default.
DECOMPOSITION = replace(
    PLAIN,
    name=DECOMPOSE,
    title="base and low-rank residuals",
    use="Several fine-tunes for servers of LoRAs: one base, and a LoRA of each.",
)


class FlexMergeMethod(ExtMethod):
    """FlexMerge: merged models of any size between one and all m models.

    Algorithm 1 of "Navigating the Accuracy-Size Trade-Off with Flexible Model Merging". The class
    is known to every mergekit process; what does the work is imported when it is needed.
    """

    def __init__(self, method: Method) -> None:
        self.declared = method
        self.spec = MergeMethodSpec(
            name=method.name,
            pretty_name=method.title,
            reference_url=method.paper,
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
        )

    def merge_one(
        self, group: TensorGroup, parameters: Mapping[str, Any], out_dtype: torch.dtype
    ) -> Merged:
        raise MergeError(
            f"{group.metadata.name}: `{self.spec.name}` merges models, not single tensors; merge "
            "with mergekit-yaml or `mergekit_ext.merge`."
        )

    def prepare(
        self,
        config: Any,
        options: Any,
        source: str | Mapping[str, Any] | None = None,
        pending: Collection[str] = (),
    ) -> Any:
        """Do what `checks.merge.check_merge` does for other methods; arguments as there."""
        from mergekit_ext.host.flexmerge.prepare import check

        return check(config, options, source, pending)
