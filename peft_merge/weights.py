r"""An adapter as the exactly equivalent change of the base's own tensors.

For somebody who reads a base model tensor by tensor: which tensors change is known from names and
shapes, and each is changed when it comes. What is computed is what PEFT's ``merge_and_unload``
computes (peft 0.21, tuners/lora/layer.py, tuners/ia3/layer.py), rounded once:

- LoRA (arXiv:2106.09685, section 4.1): :math:`W + s B A`, and :math:`b + s b_B` with `lora_bias`.
- (IA)^3 (arXiv:2205.05638, section 3.3): a feedforward module multiplies its input, so
  :math:`W \operatorname{diag}(\ell)`; any other its output, so :math:`\operatorname{diag}(\ell) W`
  and :math:`\ell \odot b`.
- Tensors that the adapter carries whole take the place of the base's, before the above.

Dilated convolutions: PEFT's LoRA convolution has no dilation, and an adapter does not show that
the base has; there, as in PEFT's own merge, the change of the weight is another function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, MergeError, NonFiniteError, Problem
from mergekit_ext.kernels.linear_algebra import add_products
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io.names import unwrapped
from peft_merge.weight_names import Located, bias_name, locate, missing_biases
from peft_merge.weight_shapes import Shape, orientations
from peft_merge.weight_ties import with_tied_once

Orientation = Callable[[str], bool | None]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _unknown(name: str) -> None:
    return None


class AdaptedWeights:
    """The tensors of a base model with an adapter applied.

    Call `touched` once with the base's tensors, then `apply` for each tensor read.

    Args:
        adapter: LoRA or (IA)^3.
    """

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._located = Located({}, {}, {})
        self._weights: dict[str, str] = {}
        self._biases: dict[str, str] = {}
        self._transposed: dict[str, bool] = {}

    def touched(
        self, shapes: Mapping[str, Shape], transposed: Orientation = _unknown
    ) -> dict[str, str]:
        """Match the adapter with a base; of the base no weight is read.

        Args:
            shapes: every tensor of the base and its shape.
            transposed: whether the base's class stores a weight transposed, None if it does not
                say; asked for square weights, see `class_orientation`.

        Returns:
            Tensors of the base that `apply` changes -> the adapter's module (or, of a tensor that
            the adapter carries whole, its name there).

        Raises:
            ConfigError: modules without a tensor, ambiguous names or orientations, shapes that do
                not fit (a grown vocabulary), `lora_bias` without a bias, `layer_replication`.
        """
        adapter = with_tied_once(self._adapter, shapes)
        located, problems = locate(adapter, shapes)
        if adapter.config.get("layer_replication"):
            problems.append(
                Problem(
                    f"adapter {adapter.name}",
                    "layer_replication",
                    "an adapter of the base's own layers",
                    "Write the replicated model first, or merge with PEFT.",
                )
            )
        problems += missing_biases(adapter, located.weights, shapes)
        own = {name: tuple(adapter.saved[key]().shape) for name, key in located.saved.items()}
        problems += self._resized(own, shapes)
        ways = self._orient(located.weights, {**shapes, **own}, transposed, problems)
        if problems:
            raise ConfigError(problems, f"adapter {adapter.name} on this base")
        self._located, self._transposed = located, ways
        self._weights = {tensor: module for module, tensor in located.weights.items()}
        self._biases = {
            bias_name(tensor): module
            for tensor, module in self._weights.items()
            if bias_name(tensor) in shapes and _changes_bias(adapter.infos[module])
        }
        return {**located.saved, **self._weights, **self._biases}

    @property
    def added(self) -> dict[str, Callable[[], Tensor]]:
        """Whole tensors that the adapter brings and the base lacks, by name; read when called."""
        return {name: self._adapter.saved[key] for name, key in self._located.added.items()}

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The base's tensor with the adapter in it.

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
        if name in self._located.saved:
            tensor = self._replaced(name, tensor)
        if name in self._weights:
            module = self._weights[name]
            _check_dtype(name, dtype)
            tensor = self._weight(module, _wide(tensor), self._transposed[module])
        elif name in self._biases:
            _check_dtype(name, dtype)
            tensor = self._bias(self._biases[name], _wide(tensor))
        result = tensor.to(dtype)
        if result is not given and not _finite(result) and _finite(given):
            raise MergeError(
                f"{name}: with adapter {self._adapter.name} it leaves the range of {dtype}. Take "
                "the base in bfloat16 or float32."
            )
        return result

    def _weight(self, module: str, weight: Tensor, transposed: bool) -> Tensor:
        if isinstance(self._adapter, LoraAdapter):
            update = self._update(module)
            left, right = update.b.to(weight), update.a.to(weight)
            if transposed:
                left, right = right.mT, left.mT
            stack = weight.reshape(len(left), left.shape[1], right.shape[2])
            return add_products(stack, left, right, update.scale).reshape(weight.shape)
        vector = self._vector(module).to(weight)
        feedforward = self._adapter.infos[module].feedforward
        if feedforward == transposed:
            # Over the first axis: outputs, or inputs of a transposed weight.
            return weight * vector.reshape(-1, *(1,) * (weight.dim() - 1))
        # A grouped convolution stores, for each output, only the inputs of its own group.
        groups = len(vector) // weight.shape[1]
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        factors = vector.reshape(groups, 1, weight.shape[1], *(1,) * (weight.dim() - 2))
        return (grouped * factors).reshape(weight.shape)

    def _bias(self, module: str, bias: Tensor) -> Tensor:
        if not isinstance(self._adapter, LoraAdapter):
            return bias * self._vector(module).to(bias)
        update = self._update(module)
        assert update.bias is not None
        return bias + update.scale * update.bias.to(bias)

    def _update(self, module: str) -> Update:
        assert isinstance(self._adapter, LoraAdapter)
        update = self._adapter.load(module)
        for part in (update.a, update.b, update.bias):
            self._check_finite(module, part)
        return update

    def _vector(self, module: str) -> Tensor:
        vector = self._adapter.load(module)
        assert isinstance(vector, Tensor)
        self._check_finite(module, vector)
        return vector.flatten()

    def _replaced(self, name: str, tensor: Tensor) -> Tensor:
        stored = self._located.saved[name]
        new = self._adapter.saved[stored]()
        self._check_finite(stored, new)
        if new.dtype != tensor.dtype:
            _check_dtype(name, tensor.dtype)
        return new.to(tensor.device)

    def _check_finite(self, module: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise NonFiniteError(module, self._adapter.name, bad, tensor.numel())

    def _resized(self, own: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Iterator[Problem]:
        for name, shape in own.items():
            if tuple(shape) != tuple(shapes[name]):
                yield Problem(
                    f"{name} of adapter {self._adapter.name}",
                    f"the whole tensor in the shape {shape}, and {tuple(shapes[name])} in the base",
                    "one shape",
                    "Resize the base (its vocabulary, or its head) as it was when the adapter was "
                    "trained, and save it.",
                )

    def _orient(
        self,
        weights: Mapping[str, str],
        shapes: Mapping[str, Shape],
        transposed: Orientation,
        problems: list[Problem],
    ) -> dict[str, bool]:
        """Which weights are stored transposed: by shape, and squares by what is known besides.

        What is known: the class of the base, as in PEFT; or else what the adapter's weights beside
        it in the same module show that are not square, if they agree.
        """
        infos = self._adapter.infos
        settled: dict[str, bool] = {}
        square: list[str] = []
        known: dict[tuple[str, str], set[bool]] = {}
        for module, tensor in weights.items():
            ways = orientations(infos[module], shapes[tensor])
            if len(ways) == 1:
                settled.update(dict.fromkeys([module], *ways))
                known.setdefault(self._alike(module), set()).update(ways)
            elif ways:
                square.append(module)
            else:
                problems.append(self._misfit(module, tensor, shapes[tensor]))
        for module in square:
            stated = transposed(weights[module])
            evidence = known.get(self._alike(module), set()) if stated is None else {stated}
            if len(evidence) == 1:
                settled.update(dict.fromkeys([module], *evidence))
            else:
                problems.append(self._ambiguous(module, weights[module], shapes[weights[module]]))
        return settled

    def _alike(self, module: str) -> tuple[str, str]:
        """The same for modules that are stored the same way round."""
        layout, name = _layout(self._adapter.infos[module]), unwrapped(module)
        return layout, name if layout == "parameter" else name.rpartition(".")[0]

    def _misfit(self, module: str, tensor: str, shape: Shape) -> Problem:
        info = self._adapter.infos[module]
        if isinstance(info, ModuleInfo) and info.layout == "convolution" and info.matrices > 1:
            return Problem(
                f"{module} of adapter {self._adapter.name}",
                f"a LoRA of a convolution with {info.matrices} groups",
                "a change that is a convolution of those groups (it mixes all inputs)",
                "Leave the adapter unmerged; PEFT cannot merge it either.",
            )
        return Problem(
            f"{module} of adapter {self._adapter.name}",
            f"a change of shape {tuple(info.shape)} for {tensor} of shape {tuple(shape)}",
            "shapes that fit",
            "Take the model that the adapter was trained on.",
        )

    def _ambiguous(self, module: str, tensor: str, shape: Shape) -> Problem:
        return Problem(
            f"{module} of adapter {self._adapter.name}",
            f"{tensor} of shape {tuple(shape)}, which may be stored (out, in) or (in, out)",
            "a weight whose orientation is known",
            "Merge this adapter into its base with PEFT and use the merged model."
            if _layout(self._adapter.infos[module]) == "parameter"
            else "Put the config.json of the base beside its weights: the class in it decides, "
            "if it is one of transformers.",
        )


def _layout(info: ModuleInfo | VectorInfo) -> str:
    if isinstance(info, ModuleInfo):
        return info.layout
    return "linear" if len(info.shape) == 2 else "convolution"


def _changes_bias(info: ModuleInfo | VectorInfo) -> bool:
    return info.bias if isinstance(info, ModuleInfo) else not info.feedforward


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise MergeError(
            f"{name}: the base stores it as {dtype}; an adapter is applied to float16, bfloat16, "
            "float32 or float64. Dequantise the base first."
        )
