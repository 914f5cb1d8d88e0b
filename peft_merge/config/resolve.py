"""The values of a method's parameters as each module gets them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit_ext.core.parameters import REQUIRED, WEIGHT, Parameter
from mergekit_ext.core.wording import did_you_mean, join, listing
from mergekit_ext.errors import Problem
from mergekit_ext.methods import Settings
from peft_merge.config.document import Input
from peft_merge.config.settings import UNSET, evaluate, filters, places, problems_of


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
