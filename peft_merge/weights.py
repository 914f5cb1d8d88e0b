r"""An adapter as the exactly equivalent change of the base's own tensors.

For a reader of a base model tensor by tensor: which tensors change is known from names and shapes,
and each is changed when it is read. The result is that of PEFT's ``merge_and_unload`` (peft 0.21,
tuners/lora/layer.py, tuners/ia3/layer.py), rounded once:

- LoRA (arXiv:2106.09685, section 4.1): :math:`W + s B A`, and :math:`b + s b_B` with `lora_bias`.
- (IA)^3 (arXiv:2205.05638, section 3.3): a feedforward module multiplies its input, so
  :math:`W \operatorname{diag}(\ell)`; any other its output, so :math:`\operatorname{diag}(\ell) W`
  and :math:`\ell \odot b`.
- Tensors that the adapter carries whole take the place of the base's, before the above.

Dilated convolutions: PEFT's LoRA convolution has no dilation, and an adapter does not show that
the base has; there, as in PEFT's own merge, the change of the weight is another function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, MergeError
from mergekit_ext.kernels.linear_algebra import add_products
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, finite, finite_update
from peft_merge.matching import Match, Orientation, Shape, match, unknown_orientation

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AdaptedWeights:
    """The tensors of a base model with an adapter applied.

    Call `touched` once with the base's tensors, then `apply` for each tensor read.

    Args:
        adapter: LoRA or (IA)^3.
    """

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._match = Match()

    def touched(
        self, shapes: Mapping[str, Shape], transposed: Orientation = unknown_orientation
    ) -> dict[str, str]:
        """Match the adapter with a base; of the base no weight is read.

        Args:
            shapes: every tensor of the base and its shape.
            transposed: whether the base's class stores a weight transposed, None if it does not
                say; asked for square weights, see `matching.class_orientation`.

        Returns:
            Tensors of the base that `apply` changes -> the adapter's module (or, of a tensor that
            the adapter carries whole, its name there).

        Raises:
            ConfigError: modules without a tensor, ambiguous names or orientations, shapes that do
                not fit (a grown vocabulary), `lora_bias` without a bias, `layer_replication`.
        """
        found, problems = match(self._adapter, shapes, transposed)
        if problems:
            raise ConfigError(problems, f"adapter {self._adapter.name} on this base")
        self._match = found
        return {**found.saved, **found.weights, **found.biases}

    @property
    def added(self) -> dict[str, Callable[[], Tensor]]:
        """Whole tensors that the adapter brings and the base lacks, by name; read when called."""
        return {name: self._adapter.saved[key] for name, key in self._match.added.items()}

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the base's tensor with the adapter in it.

        Args:
            name: of the tensor in the base.
            tensor: as read, on any device; unchanged. Floating, not quantised.

        Returns:
            Its shape, dtype and device; computed in float32 at least and cast once. `tensor`
            itself if the adapter does not touch it.

        Raises:
            MergeError: a quantised tensor, one of another shape than the adapter's, or a result
                outside the range of its dtype.
            NonFiniteError: the adapter holds NaN or infinity.
        """
        dtype, given = tensor.dtype, tensor
        if name in self._match.saved:
            stored = self._match.saved[name]
            new = finite(self._adapter.saved[stored](), stored, self._adapter.name)
            if new.dtype != dtype:
                _check_dtype(name, dtype)
            tensor = new.to(tensor.device)
        if name in self._match.weights or name in self._match.biases:
            _check_dtype(name, dtype)
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if isinstance(self._adapter, LoraAdapter):
                tensor = self._added(self._adapter, name, tensor)
            else:
                tensor = self._multiplied(self._adapter, name, tensor)
        result = tensor.to(dtype)
        if result is not given and not _finite(result) and _finite(given):
            raise MergeError(
                f"{name}: with adapter {self._adapter.name} it leaves the range of {dtype}. Take "
                "the base in bfloat16 or float32."
            )
        return result

    def _added(self, adapter: LoraAdapter, name: str, tensor: Tensor) -> Tensor:
        if name in self._match.biases:
            update = finite_update(adapter, self._match.biases[name])
            assert update.bias is not None
            return tensor + update.scale * update.bias.to(tensor)
        module = self._match.weights[name]
        update = finite_update(adapter, module)
        left, right = update.b.to(tensor), update.a.to(tensor)
        if self._match.transposed[module]:
            left, right = right.mT, left.mT
        stack = tensor.reshape(len(left), left.shape[1], right.shape[2])
        return add_products(stack, left, right, update.scale).reshape(tensor.shape)

    def _multiplied(self, adapter: Ia3Adapter, name: str, tensor: Tensor) -> Tensor:
        module = self._match.biases.get(name) or self._match.weights[name]
        vector = finite(adapter.load(module), module, adapter.name).flatten().to(tensor)
        if name in self._match.biases:
            return tensor * vector
        if adapter.infos[module].feedforward == self._match.transposed[module]:
            # Over the first axis: outputs, or inputs of a transposed weight.
            return tensor * vector.reshape(-1, *(1,) * (tensor.dim() - 1))
        # A grouped convolution stores, for each output, only the inputs of its own group.
        groups = len(vector) // tensor.shape[1]
        grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
        factors = vector.reshape(groups, 1, tensor.shape[1], *(1,) * (tensor.dim() - 2))
        return (grouped * factors).reshape(tensor.shape)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise MergeError(
            f"{name}: the base stores it as {dtype}; an adapter is applied to float16, bfloat16, "
            "float32 or float64. Dequantise the base first."
        )
