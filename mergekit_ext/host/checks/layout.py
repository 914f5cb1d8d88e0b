"""Where everything is in the user's file: mergekit turns all inputs into ``modules:``."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit_ext.errors import join

# The ``parameters:`` of several places, by path, narrowest first.
Shared = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """One input of a group. `implicit`: mergekit adds the base by itself."""

    where: str
    model: Any
    parameters: Mapping[str, Any]
    implicit: bool = False


@dataclass(frozen=True)
class Group:
    """Inputs that are merged with each other, and the parameters that they share."""

    where: str
    sources: tuple[Source, ...]
    base: Any
    shared: Shared

    @cached_property
    def by_model(self) -> dict[Any, Source]:
        """The first source with each model."""
        return {source.model: source for source in reversed(self.sources)}

    @property
    def parameters_at(self) -> str:
        """The path at which a shared parameter of this group is looked for first."""
        return next(iter(self.shared), "parameters")

    def written_at(self, name: str, source: Source | None = None) -> str:
        """Return the path of the setting that decides a parameter."""
        own = {f"{source.where}.parameters": source.parameters} if source else {}
        places = (where for where, given in {**own, **self.shared}.items() if name in given)
        return f"{next(places, self.parameters_at)}.{name}"


def groups_of(config: Any) -> list[Group]:
    """Return the groups of a `MergeConfiguration`."""
    top, base = _shared("parameters", config.parameters), config.base_model
    parts = [("", config, top)]
    for name, module in (config.modules or {}).items():
        where = f"modules.{name}."
        parts.append((where, module, {**_shared(f"{where}parameters", module.parameters), **top}))
    found: list[Group] = []
    for where, part, above in parts:
        if part.models:
            sources = _sources(f"{where}models", part.models)
            if base is not None and all(source.model != base for source in sources):
                sources += (Source("base_model", base, {}, implicit=True),)
            found.append(Group(f"{where}models", sources, base, above))
        for i, piece in enumerate(getattr(part, "slices", None) or ()):
            at = join(f"{where}slices", i)
            own = {**_shared(f"{at}.parameters", piece.parameters), **above}
            sources = _sources(f"{at}.sources", piece.sources)
            found.append(Group(at, sources, piece.base_model or base, own))
    return found


def _shared(where: str, values: Mapping[str, Any] | None) -> Shared:
    return {where: values} if values else {}


def _sources(where: str, items: Any) -> tuple[Source, ...]:
    pairs = ((join(where, i), item) for i, item in enumerate(items))
    return tuple(Source(place, item.model, item.parameters or {}) for place, item in pairs)


def all_parameters(groups: list[Group]) -> dict[str, tuple[Group, Source | None, Any]]:
    """Return every ``parameters:`` mapping by its path, with a group, and its only input if so."""
    found: dict[str, tuple[Group, Source | None, Any]] = {}
    for group in groups:
        for where, values in group.shared.items():
            found.setdefault(where, (group, None, values))
        for source in group.sources:
            if source.parameters:
                found.setdefault(f"{source.where}.parameters", (group, source, source.parameters))
    return found


def models_at(config: Any) -> dict[Any, str]:
    """Return every model that is merged, with the place in the file that names it first."""
    found: dict[Any, str] = {}
    for group in groups_of(config):
        for source in group.sources:
            found.setdefault(source.model, source.where + ("" if source.implicit else ".model"))
        if group.base is not None:
            top = group.base == config.base_model
            found.setdefault(group.base, "base_model" if top else f"{group.where}.base_model")
    return found
