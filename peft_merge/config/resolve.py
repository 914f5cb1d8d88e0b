"""The values of a method's parameters as each module gets them, in mergekit's notation.

A setting is a value, a gradient (a list of values over the layers), an entry with ``value:`` and
``filter:``, or a list of such entries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit_ext.core.parameters import REQUIRED, WEIGHT, Parameter
from mergekit_ext.errors import Problem, did_you_mean, join, listing, shown
from mergekit_ext.methods import Settings
from peft_merge.config.document import Input
from peft_merge.io.names import LAYER

_ENTRY = frozenset({"value", "filter"})
_SHAPE = (
    "a value, a list of values (a gradient over the layers), or entries with `value:` and `filter:`"
)

# Nothing of a setting applies to a module: the next source is asked.
UNSET: Any = object()


def problems_of(parameter: Parameter, setting: Any, where: str) -> Iterator[Problem]:
    """Yield everything that is wrong with a setting: its form, and each value in it."""
    several = isinstance(setting, (list, tuple))
    items = setting if several else [setting]
    if not items:
        yield Problem(where, "an empty list", _SHAPE, "Fill it in, or remove the parameter.")
    if len({isinstance(item, Mapping) for item in items}) > 1:
        remedy = "Write `- value: ...` for each of them."
        yield Problem(where, "values and filters mixed", _SHAPE, remedy)
        return
    for position, item in enumerate(items):
        place = join(where, position) if several else where
        if not isinstance(item, Mapping):
            yield from _value_problems(parameter, item, place)
            continue
        for key in item:
            if key not in _ENTRY:
                at, remedy = join(place, str(key)), did_you_mean(key, _ENTRY, listed=True)
                yield Problem(at, "an unknown key", "`value` or `filter`", remedy)
        text, value = item.get("filter"), item.get("value")
        if text is not None and not isinstance(text, str):
            yield Problem(f"{place}.filter", shown(text), "a text, part of the modules' names")
        if "value" not in item:
            yield Problem(f"{place}.value", "nothing", "a value", "Add it.")
        elif isinstance(value, (list, tuple)) and value:
            for number, each in enumerate(value):
                yield from _value_problems(parameter, each, join(f"{place}.value", number))
        else:
            yield from _value_problems(parameter, value, f"{place}.value")


def _value_problems(parameter: Parameter, value: Any, where: str) -> Iterator[Problem]:
    wrong = parameter.problem(value)
    if wrong is not None:
        yield Problem(where, shown(value), *wrong)


def evaluate(parameter: Parameter, setting: Any, module: str, place: float) -> Any:
    """Return the value of a setting for one module, or `UNSET` when no filter matches.

    Args:
        module: its name, in which filters are looked for.
        place: of its layer, from 0 to 1. Gradients of fractions are interpolated; those of other
            kinds take the value at or below the place.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, (list, tuple)):
        if not isinstance(setting[0], Mapping):
            return _along(parameter, setting, place)
        for entry in setting:
            text = entry.get("filter")
            if text in (None, "*") or text in module:
                return evaluate(parameter, entry["value"], module, place)
        return UNSET
    return parameter.read(setting)


def _along(parameter: Parameter, gradient: list[Any] | tuple[Any, ...], place: float) -> Any:
    values = [parameter.read(item) for item in gradient]
    at = place * (len(values) - 1)
    below = int(at)
    if not parameter.interpolates or None in values:
        return values[below]
    above = min(below + 1, len(values) - 1)
    share = at - below
    return (1 - share) * values[below] + share * values[above]


def filters(setting: Any) -> Iterator[str]:
    """Yield the filters of a setting that do not match everything."""
    entries = [setting] if isinstance(setting, Mapping) else setting
    if isinstance(entries, (list, tuple)):
        found = (entry.get("filter") for entry in entries if isinstance(entry, Mapping))
        yield from (text for text in found if isinstance(text, str) and text != "*")


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


def unknown_everywhere(
    known: Mapping[str, Sequence[Parameter]], shared: Mapping[Any, Any], inputs: Sequence[Input]
) -> Iterator[Problem]:
    """Yield what is wrong with settings for every method: none has them, or none takes the value.

    Args:
        known: every form that a parameter has in some method, by its name.
    """
    sources = [("parameters", shared), *((item.settings_at, item.parameters) for item in inputs)]
    for at, values in sources:
        for name, setting in values.items():
            where = join(at, str(name))
            if name not in known:
                remedy = did_you_mean(name, known, listed=True)
                yield Problem(where, "a parameter that no method has", "one of a method's", remedy)
                continue
            wrong = [list(problems_of(form, setting, where)) for form in known[name]]
            if all(wrong):
                yield from wrong[0]


@dataclass(frozen=True)
class Resolver:
    """From what the user set to values for each module. One model's own go before those of all.

    Attributes:
        method: whose parameters they are, for messages.
        parameters: that the method has.
        shared: settings of the whole merge, and defaults of per-model ones.
        inputs: with each adapter's own.
        modules: that are merged; gradients run over their layers.
    """

    method: str
    parameters: Sequence[Parameter]
    shared: Mapping[str, Any]
    inputs: Sequence[Input]
    modules: Collection[str] = ()

    @cached_property
    def _places(self) -> dict[str, float]:
        return places(self.modules)

    def problems(self) -> Iterator[Problem]:
        """Yield unknown and misplaced parameters, and wrong values. Needs no `modules`."""
        yield from self._given("parameters", self.shared, own=False)
        for item in self.inputs:
            yield from self._given(item.settings_at, item.parameters, own=True)

    def _given(self, at: str, values: Mapping[Any, Any], *, own: bool) -> Iterator[Problem]:
        known = {parameter.name: parameter for parameter in self.parameters}
        for name, setting in values.items():
            where = join(at, str(name))
            if name not in known:
                found = f"a parameter that `{self.method}` does not have"
                expected = f"one of {', '.join(sorted(known))}"
                yield Problem(where, found, expected, did_you_mean(name, known, listed=True))
            elif own and not known[name].per_model:
                found = "a parameter of the whole merge under one adapter"
                remedy = f"Move `{name}` to the `parameters` of the whole merge."
                yield Problem(where, found, "it beside the adapters", remedy)
            else:
                yield from problems_of(known[name], setting, where)

    def missing(self) -> Iterator[Problem]:
        """Yield required parameters that some module does not get. Needs correct values."""
        for parameter in self.parameters:
            if parameter.default is not REQUIRED:
                continue
            owners = self.inputs if parameter.per_model else [None]
            for owner in owners:
                holes = [m for m in self.modules if self._value(parameter, owner, m) is UNSET]
                if holes:
                    at = owner.settings_at if owner else "parameters"
                    some = "" if len(holes) == len(self.modules) else f" for {listing(holes)}"
                    yield Problem(
                        join(at, parameter.name),
                        f"nothing{some}",
                        f"a value: `{self.method}` has no default for it",
                        "Add an entry without `filter`."
                        if some
                        else f"Add `{parameter.name}` to the `parameters`.",
                    )

    def idle_filters(self) -> Iterator[str]:
        """Yield a note for each filter that matches no module."""
        sources = [("parameters", self.shared)]
        sources += [(item.settings_at, item.parameters) for item in self.inputs]
        for at, values in sources:
            for name, setting in values.items():
                for text in dict.fromkeys(filters(setting)):
                    if not any(text in module for module in self.modules):
                        yield f"{join(at, name)}: the filter {text!r} matches no adapted module."

    def __call__(self, module: str) -> Settings:
        """Return the values for one module. Needs correct settings."""
        shared = [parameter for parameter in self.parameters if not parameter.per_model]
        own = [p for p in self.parameters if p.per_model and p.name != WEIGHT.name]
        return Settings(
            self.weights(module),
            {p.name: self._value(p, None, module) for p in shared},
            [{p.name: self._value(p, item, module) for p in own} for item in self.inputs],
        )

    def weights(self, name: str) -> list[float]:
        """Return the weights of the adapters for a module, or for a whole tensor of that name."""
        return [self._value(WEIGHT, item, name) for item in self.inputs]

    def _value(self, parameter: Parameter, owner: Input | None, module: str) -> Any:
        place = self._places.get(module, 0.0)
        for values in (owner.parameters if owner else {}, self.shared):
            if parameter.name in values:
                value = evaluate(parameter, values[parameter.name], module, place)
                if value is not UNSET:
                    return value
        return UNSET if parameter.default is REQUIRED else parameter.default
