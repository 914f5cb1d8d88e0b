"""What users read about the methods: parameters, when to use them, and a YAML that runs."""

from __future__ import annotations

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
            of, default = "per model" if p.per_model else "shared", _default(p)
            lines.append(f"  {p.name} ({of}; {in_words(p.kind)}; {default}): {p.description}")
        return "\n".join([*lines, "", self.yaml.rstrip()])


class Catalogue(dict[str, Description]):
    """Methods by name; as text, a line for each."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {found.use}" for name, found in self.items())

    def named(self, name: str | None) -> Any:
        """Return the method `name`, or without one all; raise `ConfigError` for an unknown one."""
        if name is None or name in self:
            return self if name is None else self[name]
        remedy = did_you_mean(name, self)
        raise ConfigError([Problem("the method", repr(name), "one of these methods", remedy)])

    def markdown(self) -> str:
        """Return a table for documentation."""
        rows = ["| method | when to use it | parameters |", "| --- | --- | --- |"]
        for name, found in self.items():
            given = "; ".join(
                f"`{p.name}`{' (per model)' * p.per_model}: {in_words(p.kind)}, {_default(p)}"
                for p in found.parameters
            )
            linked = f"[`{name}`]({found.paper})" if found.paper else f"`{name}`"
            rows.append(f"| {linked} | {found.use} | {given} |")
        return "\n".join(rows)


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return "no default" if parameter.default is None else f"default {parameter.default}"


def document(name: str, driver: str, example: Mapping[str, Any], base: bool) -> str:
    """Return a merge in YAML."""
    kind = "lora-" if driver == ADAPTERS else ""
    models = [{"model": f"./{kind}{task}"} for task in ("code", "maths", "chat")]
    content: dict[str, Any] = {"merge_method": name, "models": models}
    if base:
        content["base_model"] = "./base"
    if example:
        content["parameters"] = dict(example)
    return str(yaml.safe_dump(content, sort_keys=False))


def described(methods: Iterable[Method], driver: str, algorithm_of: str = "") -> Catalogue:
    """Return what a driver's users read about methods, or about the algorithms of one."""
    found = Catalogue()
    for method in methods:
        example, written, name = method.example, method.name, method.name
        if algorithm_of:
            example = {"target_size": 2.25, "algorithm": name, **example}
            name, written = f"{algorithm_of}:{name}", algorithm_of
        based = driver != ADAPTERS and (method.base or bool(algorithm_of))
        text = document(written, driver, example, based)
        parameters = method.for_driver(driver)
        found[name] = Description(name, method.title, method.paper, method.use, parameters, text)
    return found


def with_family(found: Catalogue, members: Iterable[str]) -> None:
    """Add one entry for all methods with NAN's coefficients."""
    nan, name = found["nan"], "nan_<method>"
    use = f"A method with NAN's coefficients in place of weights: {', '.join(sorted(members))}."
    text = nan.yaml.replace("nan", "nan_ties", 1)
    found[name] = replace(nan, name=name, title="the method with NAN", use=use, yaml=text)
