"""A merge that can start: everything is known of it but the tensors.

The values of a method's parameters as each module gets them are in mergekit's notation: a setting
is a value, a gradient (a list of values over the layers), an entry with ``value:`` and
``filter:``, or a list of such entries.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch

from mergekit_ext.core.parameters import REQUIRED, WEIGHT, Parameter, remedy_if_open
from mergekit_ext.declared import ADAPTERS, Call, Inputs, Method
from mergekit_ext.errors import MergeWarning, Problem, did_you_mean, join, listing, shown
from peft_merge.adapter import Adapter, ModuleInfo, one_rank
from peft_merge.algebra.core_space import Rank
from peft_merge.config.document import Request
from peft_merge.io.merged import stored_ranks
from peft_merge.io.names import LAYER

Kind = Literal["lora", "ia3"]

_FORMS = "a value, a list (a gradient over the layers), or entries with `value:` and `filter:`"
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
        if listed or isinstance(item, Mapping):
            known = isinstance(item, Mapping) and {"value"} <= item.keys() <= {"value", "filter"}
            if not known or not isinstance(text := item.get("filter"), (str, NoneType)):
                problems.append(Problem(at, shown(item), _FORMS, remedy_if_open(item)))
                continue
            at, item = f"{at}.value", item["value"]
        several = isinstance(item, (list, tuple))
        values = []
        for number, value in enumerate(item if several else [item]):
            if (wrong := parameter.problem(value)) is None:
                values.append(parameter.read(value))
            else:
                place = join(at, number) if several else at
                problems.append(Problem(place, shown(value), *wrong))
        if several and not item:
            problems.append(Problem(at, "an empty list", _FORMS))
        entries.append(Entry(values, "" if text in (None, "*") else str(text)))
    return entries


def evaluate(parameter: Parameter, entries: Sequence[Entry], module: str, place: float) -> Any:
    """Return the value of a setting for one module, or `UNSET` when no filter matches.

    Of gradients of fractions it is interpolated at the layer's place; of other kinds it is the one
    at or below it.
    """
    values = next((entry.values for entry in entries if entry.text in module), None)
    if values is None:
        return UNSET
    at = place * (len(values) - 1)
    below = int(at)
    numbers = all(isinstance(value, (int, float)) for value in values)
    if len(values) == 1 or not parameter.interpolates or not numbers:
        return values[below]
    above = min(below + 1, len(values) - 1)
    share = at - below
    return (1 - share) * values[below] + share * values[above]


def places(modules: Collection[str]) -> dict[str, float]:
    """Return where each module's layer is in its stack, from 0 to 1. Outside layers: 0.

    The layer is the first number in the name, what stands before it the stack (`encoder.block`).
    As in mergekit, a stack of one layer is at 1.
    """
    matches = {module: match for module in modules if (match := LAYER.search(module))}
    found = {m: (m[: match.start()], int(match[1])) for m, match in matches.items()}
    last = dict(sorted(found.values()))
    own = {m: layer / last[stack] if last[stack] else 1.0 for m, (stack, layer) in found.items()}
    return dict.fromkeys(modules, 0.0) | own


class Resolver:
    """From what the user set to values for each module. One model's own go before those of all.

    `problems` are unknown and misplaced parameters, and wrong values.
    """

    def __init__(self, parameters: Sequence[Parameter], request: Request, modules: Collection[str]):
        self.modules = modules
        self.problems: list[Problem] = []
        self._method = request.method
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._places = places(modules)
        own = {f"{item.where}.parameters": item.parameters for item in request.inputs}
        self._own = tuple(own)
        # By where they stand; under `_SHARED` those of the whole merge.
        given = {_SHARED: request.parameters, **own}
        self._settings = {where: self._read(where, settings) for where, settings in given.items()}

    def _read(self, where: str, settings: Mapping[Any, Any]) -> dict[str, list[Entry]]:
        found = {}
        for name, setting in settings.items():
            at, parameter = join(where, str(name)), self._parameters.get(name)
            if parameter is None:
                expected = f"one of {', '.join(sorted(self._parameters))}"
                remedy = did_you_mean(name, self._parameters, listed=True)
                what = f"a parameter that `{self._method}` does not have"
                self.problems.append(Problem(at, what, expected, remedy))
            elif where != _SHARED and not parameter.per_model:
                what = "a parameter of the whole merge under one adapter"
                remedy = f"Move `{name}` to the `parameters` of the whole merge."
                self.problems.append(Problem(at, what, "it beside the adapters", remedy))
            else:
                found[name] = entries_of(parameter, setting, at, self.problems)
        return found

    def checked(self, rule: Method) -> list[Problem]:
        """Return what a rule finds wrong with its options, as each module gets them."""
        count = Inputs(len(self._own), driver=ADAPTERS)
        found: dict[Problem, None] = {}
        for values in map(self, self.modules):
            found |= dict.fromkeys(rule.check(values.options, count))
            for own in values.each:
                found |= dict.fromkeys(rule.check_each(own))
        return [*found]

    def forewarnings(self, rule: Method, counts: Iterable[int]) -> tuple[MergeWarning, ...]:
        """Return what a rule says before it merges so many adapters, once for all modules."""
        found = {
            str(warning): warning
            for values in map(self, self.modules)
            for count in counts
            for warning in rule.forewarn(values.options, Inputs(count, driver=ADAPTERS))
        }
        return tuple(found.values())

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

    def __call__(self, module: str) -> Call:
        """Return the values for one module. Needs correct settings."""
        known = self._parameters.values()
        shared = [p for p in known if not p.per_model]
        own = [p for p in known if p.per_model and p.name != WEIGHT.name]
        return Call(
            self.weights(module),
            {p.name: self._value(p, _SHARED, module) for p in shared},
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
    """A checked request."""

    request: Request
    rule: Method | None  # that merges each module by itself; None for FlexMerge
    kind: Kind  # of all adapters
    adapters: tuple[Adapter, ...]  # in the user's order; their names differ
    modules: tuple[str, ...]  # of all adapters, in the order in which they come
    resolve: Resolver
    rank: Rank | None  # of the output; None for the method's default, and for (IA)^3
    patterns: bool  # whether ranks of a LoRA's modules may differ, see `io.merged`
    space: str
    seed: int
    dtype: torch.dtype  # of the output
    device: torch.device
    saved: Mapping[str, tuple[int, ...]]  # of which adapters each whole tensor is the mean
    notes: tuple[str, ...] = ()  # what a user may want to know before the merge
    forewarnings: tuple[MergeWarning, ...] = ()  # of the method, about its result

    @property
    def forced(self) -> torch.dtype | None:
        """None without `dtype`: whole tensors, often wider than the factors, keep their own."""
        return None if self.request.dtype is None else self.dtype

    def infos(self, module: str) -> dict[str, Any]:
        """Return what a module is in each adapter that has it, by the adapter's name."""
        return {a.name: a.infos[module] for a in self.adapters if module in a.infos}

    def shape(self, module: str) -> tuple[int, ...]:
        return next(a.infos[module].shape for a in self.adapters if module in a.infos)

    def largest_rank(self, module: str) -> int:
        """Return the largest rank that a LoRA's module can get: with a number what it gets."""
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

    @property
    def numbers(self) -> int:
        """Return how many numbers the modules of the output have, at most."""
        if self.kind == "ia3":
            return sum(math.prod(self.shape(module)) for module in self.modules)
        infos = self.merged_infos()
        ranks = stored_ranks(infos, None if self.patterns else one_rank(infos.values()))
        return sum(ranks[module] * info.numbers for module, info in infos.items())
