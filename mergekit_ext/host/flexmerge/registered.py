"""Any registered merge method as FlexMerge's F."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mergekit.merge_methods import base as api
from torch import Tensor

from mergekit_ext.core.memory import copies_of
from mergekit_ext.declared import Inputs
from mergekit_ext.errors import MergeError, MergekitExtError, tensors_at
from mergekit_ext.flexmerge.algorithm import Algorithm, Parameters
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.host import session as sessions
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.method import ExtMethod, group_of
from mergekit_ext.host.nan_method import NanMethod
from mergekit_ext.host.session import Session
from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.kernels.seeds import derived, seeded
from mergekit_ext.kernels.threads import in_threads

# The shape of a tensor that a method is tried on.
_TRIAL = (8, 8)


class Registered(Algorithm):
    """A mergekit method, called with all tensors of a block at once.

    It computes in float32 at least and is rounded once. NAN measures the block as a whole. Random
    numbers depend on seed, block and members alone.
    """

    def __init__(self, method: api.MergeMethod, parameters: Parameters):
        super().__init__(parameters)
        self._method = method
        self._based = method.spec.contract.base != api.BasePolicy.IGNORED
        self.name = method.spec.name
        self.by_tensor = isinstance(method, ExtMethod)
        self.orthogonal = isinstance(method, ExtMethod) and method.declared.orthogonal

    def _copies(self, models: int, square: float) -> float:
        return copies_of(self._method)(models, square) + 2  # and its result in float32

    def check(self, findings: Findings) -> None:
        """Report what the method refuses of its parameters, or else note what it warns of."""
        inputs = Inputs(len(self.parameters.models), self._based)
        given, before = (self.parameters.shared, inputs), findings.count
        if isinstance(self._method, ExtMethod):
            findings.extend(self._method.problems(*given))
        if findings.count == before and (error := self._refusal()) is not None:
            found = f"an error of `{self.name}` ({error})"
            expected = f"parameters that `{self.name}` accepts"
            findings.problem("parameters", found, expected, "Change them.")
        if isinstance(self._method, ExtMethod) and findings.count == before:
            for note in self._method.notes(*given):
                findings.note(note)

    def _refusal(self) -> ValueError | None:
        """Return what the method raises over a few numbers in place of weights."""
        # Methods of mergekit look at some of their parameters only when they merge.
        members = range(len(self.parameters.models))
        generator = torch.Generator().manual_seed(0)
        base, *tensors = torch.randn(len(members) + 1, *_TRIAL, generator=generator)
        group = self._group("a trial", base, dict(zip(members, tensors, strict=True)))
        try:
            # In a session of its own, and without a step of the user's random numbers.
            with sessions.active(Session()), torch.random.fork_rng(devices=[]):
                self._call([group], members, torch.float32)
        except MergekitExtError:
            return None  # over these numbers; the weights may do
        except ValueError as error:
            return error
        return None

    def _merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        parts = block.layout.parts
        groups = []
        for index, part in enumerate(parts):
            models = {member: block.part(block.models[member], index) for member in members}
            groups.append(self._group(part.name, block.part(block.base, index), models))
        wide = compute_dtype([block.base, *block.models.values()])
        call = partial(self._call, members=members, dtype=wide)
        device = block.base.device
        try:
            with seeded(derived(self.parameters.seed, block.layout.name, *members), device):
                # mergekit's by one thread: torch's own split sums, whose rounding depends on
                # their number.
                own = isinstance(self._method, ExtMethod)
                (merged,) = [call(groups)] if own else in_threads(call, [groups], device)
        except MergekitExtError:
            raise
        except ValueError as error:
            where = tensors_at([part.name for part in parts])
            raise MergeError(
                f"{where} in block {block.layout.name}: `{self.name}` stops ({error}); expected "
                "what it accepts. Change its parameters, or use another `algorithm`."
            ) from error
        out = torch.empty_like(block.base, dtype=dtype)
        for part, tensor in zip(parts, merged, strict=True):
            out[part.slice] = tensor.reshape(-1)
        return out

    def _call(
        self, groups: Sequence[api.TensorGroup], members: Sequence[int], dtype: torch.dtype
    ) -> Sequence[Tensor]:
        return self._method(groups, parameters=self._bound(members), dtype=dtype)

    def _group(self, name: str, base: Tensor, tensors: dict[Any, Tensor]) -> api.TensorGroup:
        return group_of(name, {"base": base, **tensors} if self._based else tensors, "base")

    def _bound(self, members: Sequence[int]) -> dict[str, Any]:
        models, found = self.parameters.models, {}
        for spec in self._method.spec.parameters:
            if spec.scope == api.ParameterScope.SHARED:
                found[spec.name] = self.parameters.options[spec.name]
                continue
            found[spec.name] = {member: models[member][spec.name] for member in members}
            if spec.scope != api.ParameterScope.NON_BASE and self._based:
                found[spec.name]["base"] = 0.0 if spec.required else spec.default
        if isinstance(self._method, NanMethod):
            # Of this call, that is; by its own "block" NAN would go by the tensors' names.
            found["granularity"] = "model"
        return found
