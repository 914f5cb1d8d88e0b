"""What users read about the methods: parameters, when to use them, and a YAML that runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from mergekit_ext.core.parameters import Parameter, in_words
from mergekit_ext.declared.method import ADAPTERS, Method
from mergekit_ext.errors import ConfigError, Problem, did_you_mean


@dataclass(frozen=True)
class Description:
    """A method as a user writes it; as text, a page.

    Attributes:
        name, title, paper, use: what it is called, its source, when to use it.
        parameters: each with `name`, `kind`, `default`, `per_model`, `description`.
        yaml: a merge that runs, where its models are.
    """

    name: str
    title: str
    paper: str | None
    use: str
    parameters: tuple[Parameter, ...]
    yaml: str

    def __str__(self) -> str:
        head = f"{self.name}: {self.title}" + (f", {self.paper}" if self.paper else "")
        lines = [head, self.use, "", "Parameters:"]
        for p in self.parameters:
            of, default = "per model" if p.per_model else "shared", default_of(p)
            lines.append(f"  {p.name} ({of}; {in_words(p.kind)}; {default})")
            lines[-1] += f": {p.description}" if p.description else ""
        return "\n".join([*lines, "", self.yaml.rstrip()])


class Catalogue(dict[str, Description]):
    """Methods by name; as text, a line for each, and the names of `others`."""

    others: Mapping[str, Description] = {}

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{name:<{width}}  {found.use}" for name, found in self.items()]
        if names := sorted(name for name in self.others if not name.startswith("nan_")):
            lines += ["", f"Others that mergekit knows: {', '.join(names)}"]
        return "\n".join([*lines, "", "Which to take when: docs/choosing.md"])

    def named(self, name: str | None) -> Any:
        """Return the method `name`, or without one all; raise `ConfigError` for an unknown one."""
        known = {**self.others, **self}
        if name is None or name in known:
            return self if name is None else known[name]
        remedy = did_you_mean(name, known, listed=True, otherwise="")
        expected = f"one of {', '.join(known)}"
        raise ConfigError([Problem("the method", repr(name), expected, remedy)], "this name")


def default_of(parameter: Parameter) -> str:
    """Return the default of a parameter in words."""
    if parameter.required:
        return "required"
    return "no default" if parameter.default is None else f"default {parameter.default}"


def described(methods: Iterable[Method], driver: str, algorithm_of: str = "") -> Catalogue:
    """Return what a driver's users read about methods, or about the algorithms of one."""
    found, kind = Catalogue(), "lora-" if driver == ADAPTERS else ""
    for method in methods:
        example, name = dict(method.example), method.name
        if algorithm_of:
            example = {"target_size": 2.25, "algorithm": name, **example}
            name = f"{algorithm_of}:{name}"
        merge: dict[str, Any] = {"merge_method": algorithm_of or name}
        merge["models"] = [{"model": f"./{kind}{task}"} for task in ("code", "maths", "chat")]
        if driver != ADAPTERS and (method.base or algorithm_of):
            merge["base_model"] = "./base"
        if example:
            merge["parameters"] = example
        text, parameters = yaml.safe_dump(merge, sort_keys=False), method.for_driver(driver)
        found[name] = Description(name, method.title, method.paper, method.use, parameters, text)
    return found


def with_family(found: Catalogue, members: Iterable[str]) -> None:
    """Add one entry for all methods with NAN's coefficients."""
    nan, name = found["nan"], "nan_<method>"
    use = f"A method with NAN's coefficients in place of weights: {', '.join(sorted(members))}."
    text = nan.yaml.replace("nan", "nan_ties", 1)
    found[name] = replace(nan, name=name, title="the method with NAN", use=use, yaml=text)
