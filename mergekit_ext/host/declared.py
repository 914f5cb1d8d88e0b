"""A method of `mergekit_ext.methods` as one of mergekit's, tensor by tensor into one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from mergekit_ext.core.parameters import Parameter
from mergekit_ext.errors import MergeError
from mergekit_ext.events import SolverIteration
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod, raise_non_finite
from mergekit_ext.kernels.numerics import all_finite, chunks, compute_dtype
from mergekit_ext.methods import MODELS, Call, Merged, Method
from mergekit_ext.methods.method import layout_of


def spec_of(parameter: Parameter, scope: ParameterScope | None = None) -> ParameterSpec:
    """Return a parameter as mergekit declares it; `scope` is that of a per-model parameter."""
    per_model = scope or ParameterScope.NON_BASE
    return ParameterSpec(
        parameter.name,
        parameter.kind,
        per_model if parameter.per_model else ParameterScope.SHARED,
        description=parameter.description,
        **({} if parameter.required else {"default": parameter.default}),
    )


class DeclaredMethod(ExtMethod):
    r"""``W_0 + F(w_1 t_1, ..., w_m t_m)`` of one tensor, F being the declared function.

    Methods that start from stored tensors (`Method.over_base`) get those.
    """

    def __init__(self, method: Method):
        self.declared = method
        policy = BasePolicy.REQUIRED if method.base else BasePolicy.OPTIONAL
        self.spec = MergeMethodSpec(
            name=method.name,
            pretty_name=method.title,
            reference_url=method.paper,
            parameters=tuple(map(spec_of, method.for_driver(MODELS))),
            contract=InputContract(base=policy, min_non_base=1),
        )

    def merge_one(
        self, group: TensorGroup, parameters: Mapping[str, Any], out_dtype: torch.dtype
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Merge one tensor.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
            MergeError: finite inputs leave the range of the dtype.
        """
        entries = group.non_base
        if not entries or (self.declared.base and group.base is None):
            return group.entries[0].tensor.to(out_dtype), {}
        name, session = group.metadata.name or "", sessions.current()

        def report(iteration: int, objective: float, change: float) -> None:
            if session is not None:
                session.emit(SolverIteration(name, iteration, objective, change))

        call = Call(
            [parameters["weight"][entry.id] for entry in entries],
            {p.name: parameters[p.name] for p in self.spec.shared_parameters},
            [],
            layout=layout_of(name, entries[0].tensor.ndim),
            on_iteration=report,
        )
        try:
            merged = self._merged(group, call, out_dtype)
        except ValueError:
            raise_non_finite(group)
            raise
        except (OverflowError, torch.linalg.LinAlgError):
            self._raise_out_of_range(group)
        if not all_finite(merged.tensor):
            self._raise_out_of_range(group)
        ids = [str(entry.id) for entry in entries]
        details = {
            key: dict(zip(ids, value, strict=False)) if isinstance(value, list) else value
            for key, value in merged.details.items()
        }
        return merged.tensor, details

    def _merged(self, group: TensorGroup, call: Call, dtype: torch.dtype) -> Merged:
        base = None if group.base is None else group.base.tensor
        tensors = [entry.tensor for entry in group.non_base]
        if self.declared.over_base is not None:
            return self.declared.over_base(base, tensors, call, dtype)
        assert base is not None
        if not self.declared.elementwise:
            found = self._over(base, tensors, group, call)
            return Merged(found.tensor.to(dtype), found.details)
        out = torch.empty(base.shape, dtype=dtype, device=base.device)
        flat_out, flat_base = out.view(-1), base.reshape(-1)
        flat = [tensor.reshape(-1) for tensor in tensors]
        for part in chunks(flat_base):
            pieces = [source[part] for source in flat]
            flat_out[part] = self._over(flat_base[part], pieces, group, call).tensor
        return Merged(out)

    def _over(
        self, base: Tensor, tensors: Sequence[Tensor], group: TensorGroup, call: Call
    ) -> Merged:
        dtype = compute_dtype(group.tensors)
        start = base.to(dtype)
        weights = [1.0] * len(tensors) if self.declared.weighs else call.weights
        deltas = [
            (tensor.to(dtype) - start).mul_(weight)
            for tensor, weight in zip(tensors, weights, strict=True)
        ]
        if not all(map(all_finite, deltas)):
            self._raise_out_of_range(group)
        found = self.declared.merge(deltas, call)
        return Merged(found.tensor.add_(start), found.details)

    def _raise_out_of_range(self, group: TensorGroup) -> NoReturn:
        raise_non_finite(group)
        raise MergeError(
            f"{group.metadata.name}: {self.spec.name} gives values that are not finite from "
            "finite inputs; expected values within the range of the output's dtype. Check "
            "`weight` and `lambda`, and that these models are fine-tunes of one base."
        )
