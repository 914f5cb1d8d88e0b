"""Settings: values of one parameter that may vary over the modules, in mergekit's notation.

A setting is a value, a gradient (a list of values over the layers), an entry with ``value:`` and
``filter:``, or a list of such entries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergekit_ext.core.parameters import Parameter
from mergekit_ext.core.wording import did_you_mean, join, shown
from mergekit_ext.errors import Problem
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
