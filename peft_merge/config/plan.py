"""A merge that can start: everything is known of it but the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, Strict

from mergekit_ext.core.parameters import Count, Parameter, Share, Switch
from mergekit_ext.errors import MergeWarning
from mergekit_ext.methods import Method
from peft_merge.adapter import Adapter
from peft_merge.algebra.truncated import Rank
from peft_merge.config.document import Request
from peft_merge.config.settings import Resolver

Kind = Literal["lora", "ia3"]


def _rank(value: Any) -> Any:
    """``energy=0.99`` is what stands on the command line for {energy: 0.99}."""
    name, equals, share = value.partition("=") if isinstance(value, str) else ("", "", "")
    return {"energy": share} if equals and name.strip() == "energy" else value


def _name(value: Any) -> Any:
    """Torch's own objects and names are taken too."""
    return str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else value


def _device(value: Any) -> Any:
    try:
        device = torch.device(value)
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend raises errors of its own where it is not there
        reason = (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(".")
        why = reason or type(error).__name__
        raise ValueError(f"a device that can be used here, such as cpu ({why})") from None
    return device


_Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"],
    BeforeValidator(_name),
    AfterValidator(lambda name: getattr(torch, name)),
]
_Energy = Annotated[dict[Literal["energy"], Share], Field(min_length=1)]
# Beside the parameters of the method.
OPTIONS = (
    Parameter(
        "rank",
        Annotated[Count | Literal["lossless"] | _Energy, BeforeValidator(_rank)] | None,
        None,
        remedy="Write a whole number from 1, `lossless`, or {energy: 0.99}.",
    ),
    Parameter("patterns", Switch | None, None),
    Parameter("seed", Annotated[int, Strict(), Field(ge=0, lt=2**63)], 0),
    Parameter("dtype", _Dtype | None, None),
    Parameter("device", Annotated[Any, BeforeValidator(_device)], "cpu"),
    Parameter("base_model", str | None, None),
)


@dataclass(frozen=True)
class MergePlan:
    """A checked request.

    Attributes:
        request: what the user wrote.
        rule: that merges each module by itself; None for FlexMerge, which decides over all modules.
        kind: of all adapters.
        adapters: in the user's order, their names differ.
        modules: of all adapters, in the order in which they come.
        resolve: the values of its parameters for each module.
        rank: of the output, None for the default of the method and for (IA)^3.
        patterns: whether ranks of a LoRA's modules may differ, see `peft_merge.io.merged`.
        space: where it works.
        seed: of random rules.
        dtype: of the output.
        device: where is computed.
        base_model: the name that the configuration of the output gives; None for the inputs' own.
        saved: for each whole tensor of the output the positions of the adapters it is the mean of.
        notes: what a user may want to know before the merge.
        forewarnings: what the method says of its result before it is computed.
    """

    request: Request
    rule: Method | None
    kind: Kind
    adapters: tuple[Adapter, ...]
    modules: tuple[str, ...]
    resolve: Resolver
    rank: Rank | None
    patterns: bool
    space: str
    seed: int
    dtype: torch.dtype
    device: torch.device
    base_model: str | None
    saved: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    forewarnings: tuple[MergeWarning, ...] = ()

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of the module's change."""
        return next(a.infos[module].shape for a in self.adapters if module in a.infos)

    def described(self) -> dict[str, Any]:
        """Return method, adapters and options as the report shows them."""
        sources = [item.source for item in self.request.inputs]
        return {
            "method": self.request.method,
            "kind": self.kind,
            "adapters": [
                {
                    "name": adapter.name,
                    "source": None if isinstance(source, Adapter) else str(source),
                    "modules": len(adapter.infos),
                }
                for adapter, source in zip(self.adapters, sources, strict=True)
            ],
            "parameters": {
                "shared": dict(self.request.parameters),
                "each": [dict(item.parameters) for item in self.request.inputs],
            },
            "rank": self.rank,
            "patterns": self.patterns,
            "space": self.space,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
