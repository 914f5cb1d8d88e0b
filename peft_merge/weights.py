r"""An adapter as the exactly equivalent change of the base's own tensors.

The result is that of PEFT's ``merge_and_unload`` (peft 0.21, tuners/lora/layer.py,
tuners/ia3/layer.py), rounded once:

- LoRA (arXiv:2106.09685, section 4.1): :math:`W + s B A`, and :math:`b + s b_B` with `lora_bias`.
- (IA)^3 (arXiv:2205.05638, section 3.3): a feedforward module multiplies its input, so
  :math:`W \operatorname{diag}(\ell)`; any other its output, so :math:`\operatorname{diag}(\ell) W`
  and :math:`\ell \odot b`.
- Tensors that the adapter carries whole take the place of the base's, before the above.

Dilated convolutions: PEFT's LoRA convolution has no dilation, and an adapter does not show that
the base has; there, as in PEFT's own merge, the change of the weight is another function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.kernels.linear_algebra import add_products
from mergekit_ext.kernels.numerics import all_finite, finite
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, finite_update


@dataclass(frozen=True)
class AdaptedWeights:
    """The tensors of a base model with an adapter applied, each when it is read.

    Attributes:
        adapter: LoRA or (IA)^3.
        weights: tensors of the base -> the modules that adapt them.
        biases: biases of the base -> the modules that change them.
        saved: tensors of the base that the adapter replaces -> their names in the adapter.
        added: whole tensors that the adapter brings and the base lacks, by name; read when called.
        transposed: modules -> whether the base stores their weights as (columns, rows).
    """

    adapter: Adapter
    weights: Mapping[str, str]
    biases: Mapping[str, str]
    saved: Mapping[str, str]
    added: Mapping[str, Callable[[], Tensor]]
    transposed: Mapping[str, bool]

    @cached_property
    def touched(self) -> set[str]:
        """The base's tensors that `apply` changes."""
        return {*self.weights, *self.biases, *self.saved}

    def stored_as(self, names: Mapping[str, str]) -> "AdaptedWeights":
        """Return the same with other names of the base's tensors, all of which are in `names`."""
        weights, biases, saved = (
            {names[tensor]: own for tensor, own in part.items()}
            for part in (self.weights, self.biases, self.saved)
        )
        return replace(self, weights=weights, biases=biases, saved=saved)

    def read(
        self,
        name: str,
        base: Callable[[str], Tensor],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a tensor of the base with the adapter in it, or one that the adapter adds.

        The adapter is applied on `device`, and the tensor lies where `base` has it. Floating ones
        get `dtype`, if it is given; a changed one is rounded once.
        """
        tensor = self.added[name]() if name in self.added else base(name)
        if not tensor.is_floating_point():
            dtype = None
        if name in self.touched:
            wide = tensor.dtype if dtype is None else torch.promote_types(tensor.dtype, dtype)
            given = tensor.to(tensor.device if device is None else device, wide)
            tensor = self.apply(name, given).to(tensor.device)
        return tensor if dtype is None else tensor.to(dtype)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the base's `tensor`, which stays as it is, with the adapter in it.

        It has its shape, dtype and device, is computed in float32 at least and cast once; itself if
        the adapter does not touch it.

        Raises:
            MergeError: a quantised tensor, or a result outside the range of its dtype.
            NonFiniteError: the adapter holds NaN or infinity.
        """
        dtype, given = tensor.dtype, tensor
        if name in self.saved:
            stored = self.saved[name]
            tensor = finite(self.adapter.saved[stored](), stored, self.adapter.name)
            tensor = tensor.to(given.device)
        module = self.weights.get(name) or self.biases.get(name)
        if (module is not None or tensor.dtype != dtype) and dtype not in FLOATING.values():
            raise MergeError(
                f"{name}: the base stores it as {dtype}; an adapter is applied to float16, "
                "bfloat16, float32 or float64. Dequantise the base first."
            )
        if module is not None:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            transposed = self.transposed[module] if name in self.weights else None
            if isinstance(self.adapter, LoraAdapter):
                tensor = _added(self.adapter, module, tensor, transposed)
            else:
                tensor = _scaled(self.adapter, module, tensor, transposed)
        result = tensor.to(dtype)
        if result is not given and not all_finite(result) and all_finite(given):
            raise MergeError(
                f"{name}: with adapter {self.adapter.name} it leaves the range of {dtype}. Take "
                "the base in bfloat16 or float32."
            )
        return result


# `transposed` is None for a bias.
def _added(adapter: LoraAdapter, module: str, tensor: Tensor, transposed: bool | None) -> Tensor:
    update = finite_update(adapter, module)
    if transposed is None:
        assert update.bias is not None
        return tensor + update.scale * update.bias.to(tensor)
    left, right = update.b.to(tensor), update.a.to(tensor)
    if transposed:
        left, right = right.mT, left.mT
    stack = tensor.reshape(len(left), left.shape[1], right.shape[2])
    return add_products(stack, left, right, update.scale).reshape(tensor.shape)


def _scaled(adapter: Ia3Adapter, module: str, tensor: Tensor, transposed: bool | None) -> Tensor:
    vector = finite(adapter.load(module), module, adapter.name).flatten().to(tensor)
    if transposed is None:
        return tensor * vector
    if adapter.infos[module].feedforward == transposed:
        # Over the first axis: outputs, or inputs of a transposed weight.
        return tensor * vector.reshape(-1, *(1,) * (tensor.dim() - 1))
    # A grouped convolution stores, for each output, only the inputs of its own group.
    groups = len(vector) // tensor.shape[1]
    grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
    factors = vector.reshape(groups, 1, tensor.shape[1], *(1,) * (tensor.dim() - 2))
    return (grouped * factors).reshape(tensor.shape)
