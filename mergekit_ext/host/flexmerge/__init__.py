"""`merge_method: flexmerge`: from mergekit's configuration to the FlexMerge engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, MergeMethodSpec, TensorGroup

from mergekit_ext.declared import Merged
from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.plan import PAPER, TITLE, USE
from mergekit_ext.host.method import ExtMethod

DECOMPOSE = "decompose"


class FlexMergeMethod(ExtMethod):
    """FlexMerge: merged models of any size between one and all m models.

    Algorithm 1 of "Navigating the Accuracy-Size Trade-Off with Flexible Model Merging". The class
    is known to every mergekit process; what does the work is imported when it is needed.
    """

    title, use = TITLE, USE
    paper: str | None = PAPER

    def __init__(self, name: str = "flexmerge") -> None:
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=self.title,
            reference_url=self.paper,
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


class DecomposeMethod(FlexMergeMethod):
    """One base and a low-rank residual of each model, as adapters by default.

    `flexmerge` with ``algorithm: residual``, under a name of its own.
    """

    title, paper = "base and low-rank residuals", None
    use = "Several fine-tunes for servers of LoRAs: one base, and a LoRA of each."

    def __init__(self) -> None:
        super().__init__(DECOMPOSE)
