"""`merge_method: flexmerge`: from mergekit's configuration to the FlexMerge engine."""

from dataclasses import replace

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, MergeMethodSpec, TensorGroup

from mergekit_ext.core.parameters import Values
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
        contract = InputContract(base=BasePolicy.REQUIRED, min_non_base=2)
        self.spec = MergeMethodSpec(method.name, (), contract, method.title, method.paper)

    def merge_one(self, group: TensorGroup, parameters: Values, out_dtype: torch.dtype) -> Merged:
        raise MergeError(
            f"{group.metadata.name}: `{self.spec.name}` merges models, not single tensors; merge "
            "with mergekit-yaml or `mergekit_ext.merge`."
        )
