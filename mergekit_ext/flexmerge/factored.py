"""Matrices that stay a base and factors in the modules of transformers: theta_0 + B A.

`Factored` is such a matrix as a tensor, which transformers renames, casts and ties as any other.
`leave_factors` then puts base and factors into the leaf modules whose weights they are; these
multiply by them without forming the matrix.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from mergekit_ext.flexmerge.stored import restored

_PARTS = ("theta_0", "lora_B", "lora_A")
_ADVICE = "flexmerge.load(..., merged=True) gives ordinary parameters."
_FIELDS = "dtype device shape ndim is_meta requires_grad is_leaf grad grad_fn"
# What can be asked about a matrix without its elements.
_ASKING: set[Callable[..., Any]] = {
    *(getattr(Tensor, name).__get__ for name in _FIELDS.split()),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
    Tensor.requires_grad_,
}
_KEEPING: set[Callable[..., Any]] = {Tensor.to, Tensor.detach}


class Factored(Tensor):
    """The matrix ``theta_0 + B A``, formed by every operation that needs its elements.

    Casts, moves and ``tensor[...]`` keep it in parts; operations that write to it are refused.
    """

    parts: tuple[Tensor, ...]  # theta_0, B, A
    refusal = f"a matrix of a base and factors cannot be written to. {_ADVICE}"
    _formed: Tensor | None = None

    @classmethod
    def of(cls, *parts: Tensor) -> "Factored":
        if isinstance(parts[0], Factored):
            return parts[0]
        made = parts[0].detach().as_subclass(cls)
        made.parts = parts
        return made

    def formed(self) -> Tensor:
        """Return the matrix, formed once."""
        if self._formed is None:
            self._formed = restored(*self.parts)
        return self._formed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        keeps = func in _KEEPING or (func is Tensor.__getitem__ and args[1] is Ellipsis)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ASKING:
                return func(*args, **kwargs)
            if keeps and isinstance(args[0], cls):
                return cls.of(*(func(part, *args[1:], **kwargs) for part in args[0].parts))
            if _writes(func.__name__) and isinstance(args[0], cls):
                raise TypeError(cls.refusal)
            args, kwargs = tree_map(
                lambda value: value.formed() if isinstance(value, cls) else value, (args, kwargs)
            )
            return func(*args, **kwargs)


def _writes(name: str) -> bool:
    """Return whether an operation of that name is one in place, or assigns."""
    if not name.endswith("__"):
        return name.endswith("_")
    in_place = name[2] == "i" and hasattr(Tensor, "__" + name[3:])
    return in_place or name in ("__set__", "__setitem__")


class Leaf(torch.nn.Module):
    """A leaf module with a base and factors in place of `weight`, which is formed when it is used.

    Its state dictionary has the weight.
    """

    theta_0: torch.nn.Parameter
    lora_A: torch.nn.Parameter  # noqa: N815
    lora_B: torch.nn.Parameter  # noqa: N815
    axis = -1  # of the result, along which its features lie

    def base(self, x: Tensor) -> Tensor:
        """Return what the module with theta_0 as its weight does, bias included."""
        raise NotImplementedError

    def change(self, x: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """Return what factors add to that."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.lora_A.numel():
            return out
        return out + self.change(x, self.lora_B, self.lora_A)

    @property
    def weight(self) -> Factored:
        return Factored.of(self.theta_0, self.lora_B, self.lora_A)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _PARTS:
            del destination[prefix + name]
        # Tied modules have one weight, as they have one parameter.
        weight = getattr(self.theta_0, "weight", lambda: None)()
        if not any(weight is value for value in destination.values()):
            weight = self.weight.detach()
            self.theta_0.weight = weakref.ref(weight)
        destination[f"{prefix}weight"] = weight

    def _load_from_state_dict(self, state: Any, prefix: str, *given: Any) -> None:
        given[-1].append(f"{prefix}weight is a base and factors. {_ADVICE}")


class _Linear(Leaf, torch.nn.Linear):
    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.theta_0, self.bias)

    def change(self, x: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)


class _Conv1D(Leaf, Conv1D):
    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.theta_0.T, self.bias)

    def change(self, x: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return x @ b @ a


class _Embedding(Leaf, torch.nn.Embedding):
    def base(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.theta_0, self.padding_idx)

    def change(self, x: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, b) @ a


class _Convolution(Leaf):
    def base(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.theta_0, self.bias)

    def change(self, x: Tensor, b: Tensor, a: Tensor) -> Tensor:
        inner = self._conv_forward(x, a.view(len(a), *self.theta_0.shape[1:]), None)
        return F.linear(inner.movedim(self.axis, -1), b).movedim(-1, self.axis)

    @property
    def axis(self) -> int:  # type: ignore[override]
        return -len(self.kernel_size) - 1


_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_LEAVES: dict[type, type[Leaf]] = {
    torch.nn.Linear: _Linear,
    torch.nn.Embedding: _Embedding,
    Conv1D: _Conv1D,
    **{kind: type(kind.__name__, (_Convolution, kind), {}) for kind in _CONVOLUTIONS},
}


@cache
def _leaf(kind: type) -> type[Leaf] | None:
    """Return the class of leaves that behave as `kind`; a forward of its own stays in place."""
    for known, leaf in _LEAVES.items():
        if issubclass(kind, known):
            bases = (leaf,) if kind is known else (kind, leaf)
            return type(kind.__name__, bases, {})
    return None


def leave_factors(model: torch.nn.Module) -> None:
    """Leave matrices that are `Factored` in parts where a leaf module can; form the others."""
    # Tied parameters stay tied.
    formed: dict[int, Tensor] = {}
    parts: dict[int, list[torch.nn.Parameter]] = {}
    for module, table, name, tensor in [*_factored(model)]:
        key = id(tensor)
        plain = getattr(module, "groups", 1) == 1 and getattr(module, "max_norm", None) is None
        leaf = _leaf(module.__class__) if name == "weight" and plain else None
        if leaf is None:
            if key not in formed:
                whole, is_parameter = tensor.formed(), isinstance(tensor, torch.nn.Parameter)
                formed[key] = torch.nn.Parameter(whole) if is_parameter else whole
            table[name] = formed[key]
            continue
        if key not in parts:
            parts[key] = [torch.nn.Parameter(part) for part in tensor.parts]
        del table[name]
        module.__class__ = leaf
        for part, parameter in zip(_PARTS, parts[key], strict=True):
            # accelerate takes tied parameters without elements for one.
            own = parameter if parameter.numel() else torch.nn.Parameter(parameter.data)
            module.register_parameter(part, own)


def _factored(model: torch.nn.Module) -> Iterator[tuple[Any, dict[str, Any], str, Factored]]:
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if isinstance(tensor, Factored):
                    yield module, table, name, tensor
