"""A merge that can start: everything is known of it but the tensors.

The values of a method's parameters as each module gets them are in mergekit's notation: a setting
is a value, a gradient (a list of values over the layers), an entry with ``value:`` and
``filter:``, or a list of such entries.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from mergekit_ext.core.parameters import REQUIRED, WEIGHT, Parameter
from mergekit_ext.errors import MergeWarning, Problem, did_you_mean, join, listing, shown
from mergekit_ext.methods import Method, Settings
from peft_merge.adapter import Adapter, ModuleInfo, one_rank
from peft_merge.algebra.truncated import Rank
from peft_merge.config.document import Request, plain
from peft_merge.io.merged import stored_ranks
from peft_merge.io.names import LAYER

Kind = Literal["lora", "ia3"]

_KEYS = frozenset({"value", "filter"})
_FORMS = (
    "a value, a list of values (a gradient over the layers), or entries with `value:` and `filter:`"
)
_SHARED = "parameters"
# Nothing of a setting applies to a module: the next source is asked.
UNSET: Any = object()


class Entry(NamedTuple):
    """A value, or a gradient of several, for the modules whose names hold a text; "" for all."""

    values: list[Any]
    text: str = ""


def entries_of(
    parameter: Parameter, setting: Any, where: str, problems: list[Problem]
) -> list[Entry]:
    """Return a setting, values as the parameter's type; all that is wrong joins `problems`."""
    listed = isinstance(setting, (list, tuple)) and any(isinstance(i, Mapping) for i in setting)
    entries = []
    for position, item in enumerate(setting if listed else [setting]):
        at, text = join(where, position) if listed else where, None
        if isinstance(item, Mapping):
            for key in (key for key in item if key not in _KEYS):
                remedy = did_you_mean(key, _KEYS, listed=True)
                expected = "`value` or `filter`"
                problems.append(Problem(join(at, str(key)), "an unknown key", expected, remedy))
            text = item.get("filter")
            if text is not None and not isinstance(text, str):
                expected = "a text, part of the modules' names"
                problems.append(Problem(f"{at}.filter", shown(text), expected))
            at = f"{at}.value"
            if "value" not in item:
                problems.append(Problem(at, "nothing", "a value", "Add it."))
                continue
            item = item["value"]
        elif listed:
            remedy = "Write `- value: ...` for each of them."
            problems.append(Problem(where, "values and filters mixed", _FORMS, remedy))
            break
        several = isinstance(item, (list, tuple))
        values = []
        for number, value in enumerate(item if several else [item]):
            if (wrong := parameter.problem(value)) is None:
                values.append(parameter.read(value))
            else:
                place = join(at, number) if several else at
                problems.append(Problem(place, shown(value), *wrong))
        if several and not item:
            remedy = "Fill it in, or remove the parameter."
            problems.append(Problem(at, "an empty list", _FORMS, remedy))
        entries.append(Entry(values, "" if text in (None, "*") else str(text)))
    return entries


def evaluate(parameter: Parameter, entries: Sequence[Entry], module: str, place: float) -> Any:
    """Return the value of a setting for one module, or `UNSET` when no filter matches.

    Gradients of fractions are interpolated at the place of the layer, from 0 to 1; those of other
    kinds take the value at or below it.
    """
    values = next((entry.values for entry in entries if entry.text in module), None)
    if values is None:
        return UNSET
    at = place * (len(values) - 1)
    below = int(at)
    if len(values) == 1 or not parameter.interpolates or None in values:
        return values[below]
    above = min(below + 1, len(values) - 1)
    share = at - below
    return (1 - share) * values[below] + share * values[above]


def places(modules: Collection[str]) -> dict[str, float]:
    """Return where each module's layer is, from 0 to the last one: 1. Outside layers: 0.

    The layer is the first number in the name. What stands before it (`encoder.block`,
    `decoder.block`) names a stack of layers, and each stack goes from 0 to 1. As in mergekit, a
    stack of one layer is at 1.
    """
    found: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for module in modules:
        if (match := LAYER.search(module)) is not None:
            stack, layer = module[: match.start()], int(match[1])
            found[module] = (stack, layer)
            last[stack] = max(last.get(stack, 0), layer)
    result = dict.fromkeys(modules, 0.0)
    for module, (stack, layer) in found.items():
        result[module] = layer / last[stack] if last[stack] else 1.0
    return result


class Resolver:
    """From what the user set to values for each module. One model's own go before those of all.

    Args:
        method: whose parameters they are; None for those of all methods.
        parameters: that the method has.
        request: with the settings.
        modules: that are merged; gradients run over their layers.

    Attributes:
        problems: unknown and misplaced parameters, and wrong values.
    """

    def __init__(
        self,
        method: str | None,
        parameters: Sequence[Parameter],
        request: Request,
        modules: Collection[str],
    ):
        self.modules = modules
        self.problems: list[Problem] = []
        self._method = method
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._places = places(modules)
        own = {f"{item.where}.parameters": item.parameters for item in request.inputs}
        self._own = tuple(own)
        # By where they stand; under `_SHARED` those of the whole merge.
        self._settings = {
            where: self._read(where, settings)
            for where, settings in {_SHARED: request.parameters, **own}.items()
        }

    def _read(self, where: str, settings: Mapping[Any, Any]) -> dict[str, list[Entry]]:
        found = {}
        for name, setting in settings.items():
            at, parameter = join(where, str(name)), self._parameters.get(name)
            if parameter is None:
                expected = f"one of {', '.join(sorted(self._parameters))}"
                remedy = did_you_mean(name, self._parameters, listed=True)
                what = "a parameter that no method has"
                if self._method is not None:
                    what = f"a parameter that `{self._method}` does not have"
                self.problems.append(Problem(at, what, expected, remedy))
            elif where != _SHARED and not parameter.per_model:
                what = "a parameter of the whole merge under one adapter"
                remedy = f"Move `{name}` to the `parameters` of the whole merge."
                self.problems.append(Problem(at, what, "it beside the adapters", remedy))
            else:
                found[name] = entries_of(parameter, setting, at, self.problems)
        return found

    def missing(self) -> Iterator[Problem]:
        """Yield required parameters that some module does not get. Needs correct values."""
        for parameter in self._parameters.values():
            if parameter.default is not REQUIRED:
                continue
            for where in self._own if parameter.per_model else [_SHARED]:
                holes = [m for m in self.modules if self._value(parameter, where, m) is UNSET]
                if holes:
                    found, remedy = "nothing", f"Add `{parameter.name}` to the `parameters`."
                    if len(holes) < len(self.modules):
                        found += f" for {listing(holes)}"
                        remedy = "Add an entry without `filter`."
                    expected = f"a value: `{self._method}` has no default for it"
                    yield Problem(join(where, parameter.name), found, expected, remedy)

    def idle_filters(self) -> Iterator[str]:
        """Yield a note for each filter that matches no module."""
        for where, settings in self._settings.items():
            for name, entries in settings.items():
                for text in dict.fromkeys(entry.text for entry in entries):
                    if text and not any(text in module for module in self.modules):
                        yield f"{join(where, name)}: the filter {text!r} matches no adapted module."

    def __call__(self, module: str) -> Settings:
        """Return the values for one module. Needs correct settings."""
        known = self._parameters.values()
        own = [p for p in known if p.per_model and p.name != WEIGHT.name]
        return Settings(
            self.weights(module),
            {p.name: self._value(p, _SHARED, module) for p in known if not p.per_model},
            [{p.name: self._value(p, where, module) for p in own} for where in self._own],
        )

    def weights(self, name: str) -> list[float]:
        """Return the weights of the adapters for a module, or for a whole tensor of that name."""
        return [self._value(WEIGHT, where, name) for where in self._own]

    def _value(self, parameter: Parameter, where: str, module: str) -> Any:
        place = self._places.get(module, 0.0)
        for at in (where, _SHARED):
            entries = self._settings[at].get(parameter.name, [])
            if (value := evaluate(parameter, entries, module, place)) is not UNSET:
                return value
        return UNSET if parameter.default is REQUIRED else parameter.default


@dataclass(frozen=True)
class MergePlan:
    """A checked request.

    Attributes:
        request: what the user wrote.
        rule: that merges each module by itself; None for FlexMerge, which decides over all modules.
        kind: of all adapters.
        adapters: in the user's order, their names differ; `base_model` is in their configurations.
        modules: of all adapters, in the order in which they come.
        resolve: the values of its parameters for each module.
        rank: of the output, None for the default of the method and for (IA)^3.
        patterns: whether ranks of a LoRA's modules may differ, see `peft_merge.io.merged`.
        space: where it works.
        seed: of random rules.
        dtype: of the output.
        device: where is computed.
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
    saved: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    forewarnings: tuple[MergeWarning, ...] = ()

    def infos(self, module: str) -> dict[str, Any]:
        """Return what a module is in each adapter that has it, by the adapter's name."""
        return {a.name: a.infos[module] for a in self.adapters if module in a.infos}

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of the module's change."""
        return next(a.infos[module].shape for a in self.adapters if module in a.infos)

    def largest_rank(self, module: str) -> int:
        """Return the rank that a LoRA's module can get: with a number for `rank` what it gets."""
        _, rows, columns = self.shape(module)
        bound = min(rows, columns)
        if isinstance(self.rank, int):
            return min(self.rank, bound)
        in_span = self.rule is not None and (  # of the factors
            self.space != "delta" or self.rule.invariant(self.resolve(module).options)
        )
        if self.rank is not None and not in_span:
            return bound
        return min(sum(info.rank for info in self.infos(module).values()), bound)

    def merged_infos(self) -> dict[str, ModuleInfo]:
        """Return what each module of a LoRA is in the output, with the largest rank it can get."""
        return {
            module: replace(next(iter(self.infos(module).values())), rank=self.largest_rank(module))
            for module in self.modules
        }

    def numbers(self, *, patterns: bool) -> int:
        """Return how many numbers the modules of the output have, at most; `patterns` as above."""
        if self.kind == "ia3":
            return sum(math.prod(self.shape(module)) for module in self.modules)
        infos = self.merged_infos()
        ranks = stored_ranks(infos, None if patterns else one_rank(infos.values()))
        return sum(
            info.matrices * ranks[module] * (info.rows + info.columns)
            for module, info in infos.items()
        )

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
            "parameters": plain(
                {
                    "shared": self.request.parameters,
                    "each": [item.parameters for item in self.request.inputs],
                }
            ),
            "rank": self.rank,
            "patterns": self.patterns,
            "space": self.space,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
