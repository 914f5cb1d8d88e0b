"""A method of `mergekit_ext.methods` as one of mergekit's, tensor by tensor into one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
from mergekit_ext.errors import MergeError, MergeWarning, Problem
from mergekit_ext.events import SolverIteration
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod, raise_non_finite
from mergekit_ext.host.session import TensorRecord
from mergekit_ext.kernels.numerics import all_finite, chunks, compute_dtype
from mergekit_ext.methods import MODELS, Call, Inputs, Merged, Method
from mergekit_ext.methods.method import layout_of
from mergekit_ext.report.card import solver_section


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
        self.method = method
        policy = BasePolicy.REQUIRED if method.base else BasePolicy.OPTIONAL
        self.spec = MergeMethodSpec(
            name=method.name,
            pretty_name=method.title,
            reference_url=method.paper,
            parameters=tuple(map(spec_of, method.for_driver(MODELS))),
            contract=InputContract(base=policy, min_non_base=1),
        )

    def problems(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[Problem]:
        """Return those of the declaration."""
        return self.method.check(options, inputs)

    def input_problems(self, values: Mapping[str, Any]) -> Iterable[Problem]:
        """Return those of the declaration."""
        return self.method.check_each(values)

    def forewarnings(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[MergeWarning]:
        """Return those of the declaration."""
        return self.method.forewarn(options, inputs)

    def copies(self, models: int, square: float) -> float:
        """Those of the declaration."""
        return self.method.copies(models, square)

    def warnings(self, records: Sequence[TensorRecord]) -> Iterable[MergeWarning]:
        """Those of the declaration."""
        return self.method.after(self.spec.name, {r.name: r.details for r in records})

    def summary(self, records: Sequence[TensorRecord]) -> str:
        """Convergence, ranks and singular values, of methods with a solver."""
        return solver_section({r.name: r.details for r in records})

    def merge_one(
        self, group: TensorGroup, parameters: Mapping[str, Any], out_dtype: torch.dtype
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Merge one tensor.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
            MergeError: finite inputs leave the range of the dtype.
        """
        entries = group.non_base
        if not entries or (self.method.base and group.base is None):
            return group.entries[0].tensor.to(out_dtype), {}
        name = group.metadata.name or ""
        call = Call(
            [parameters["weight"][entry.id] for entry in entries],
            {p.name: parameters[p.name] for p in self.spec.parameters if _is_shared(p)},
            [],
            layout=layout_of(name, entries[0].tensor.ndim),
            on_iteration=_reporter(name),
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
        if self.method.over_base is not None:
            return self.method.over_base(base, tensors, call, dtype)
        assert base is not None
        if not self.method.elementwise:
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
        weights = [1.0] * len(tensors) if self.method.weighs else call.weights
        deltas = [
            (tensor.to(dtype) - start).mul_(weight)
            for tensor, weight in zip(tensors, weights, strict=True)
        ]
        if not all(map(all_finite, deltas)):
            self._raise_out_of_range(group)
        found = self.method.merge(deltas, call)
        return Merged(found.tensor.add_(start), found.details)

    def _raise_out_of_range(self, group: TensorGroup) -> None:
        raise_non_finite(group)
        raise MergeError(
            f"{group.metadata.name}: {self.spec.name} gives values that are not finite from "
            "finite inputs; expected values within the range of the output's dtype. Check "
            "`weight` and `lambda`, and that these models are fine-tunes of one base."
        )


def _is_shared(parameter: ParameterSpec) -> bool:
    return parameter.scope == ParameterScope.SHARED


def _reporter(name: str) -> Callable[[int, float, float], None] | None:
    session = sessions.current()
    if session is None:
        return None

    def report(iteration: int, objective: float, change: float) -> None:
        session.emit(SolverIteration(name, iteration, objective, change))

    return report
