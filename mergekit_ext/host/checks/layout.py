"""Where everything is in a configuration, before mergekit rewrites it.

mergekit turns ``models:`` and ``slices:`` into ``modules:`` before it plans, so that paths in its
own errors are not those of the user's file. Here each group of inputs keeps its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit_ext.errors import join


@dataclass(frozen=True)
class Settings:
    """One ``parameters:`` mapping. `model` is set where it belongs to one input only."""

    where: str
    values: Mapping[str, Any]
    model: Any = None


@dataclass(frozen=True)
class Source:
    """One input of a group. `implicit`: mergekit adds the base by itself."""

    where: str
    model: Any
    settings: Settings | None
    implicit: bool = False


@dataclass(frozen=True)
class Group:
    """Inputs that are merged with each other, and the mappings above them, narrowest first."""

    where: str
    sources: tuple[Source, ...]
    base: Any
    settings: tuple[Settings, ...]

    def source(self, model: Any) -> Source | None:
        """Return the first source with this model."""
        return self._by_model.get(model)

    @cached_property
    def _by_model(self) -> dict[Any, Source]:
        # A dictionary finds the same object without comparing fields, which pydantic does slowly.
        return {source.model: source for source in reversed(self.sources)}

    @property
    def has_base(self) -> bool:
        """Whether the base is among the inputs."""
        return self.base is not None and self.source(self.base) is not None

    def parameters_at(self) -> str:
        """Return the path at which a shared parameter of this group is looked for first."""
        return self.settings[0].where if self.settings else "parameters"


def groups_of(config: Any) -> list[Group]:
    """Return the groups of a `MergeConfiguration`, or of mergekit-pytorch's configuration."""
    top = _settings("parameters", config.parameters)
    parts = [("", config, top)]
    for name, module in (getattr(config, "modules", None) or {}).items():
        where = f"modules.{name}."
        parts.append((where, module, _settings(f"{where}parameters", module.parameters) + top))
    found: list[Group] = []
    for where, part, above in parts:
        if part.models:
            found.append(_models_group(f"{where}models", part.models, config.base_model, above))
        for i, piece in enumerate(getattr(part, "slices", None) or ()):
            at = join(f"{where}slices", i)
            sources = _sources(f"{at}.sources", piece.sources)
            own = _settings(f"{at}.parameters", piece.parameters)
            base = piece.base_model or config.base_model
            found.append(Group(at, tuple(sources), base, own + above))
    return found


def all_settings(groups: list[Group]) -> list[tuple[Group, Settings]]:
    """Return every ``parameters:`` mapping once, with a group that it acts on."""
    found: dict[str, tuple[Group, Settings]] = {}
    for group in groups:
        own = [source.settings for source in group.sources if source.settings is not None]
        for settings in (*group.settings, *own):
            found.setdefault(settings.where, (group, settings))
    return list(found.values())


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


def _settings(where: str, values: Mapping[str, Any] | None) -> tuple[Settings, ...]:
    return (Settings(where, values),) if values else ()


def _sources(where: str, items: Any) -> list[Source]:
    found = []
    for i, item in enumerate(items):
        at, values = join(where, i), item.parameters
        settings = Settings(f"{at}.parameters", values, item.model) if values else None
        found.append(Source(at, item.model, settings))
    return found


def _models_group(where: str, models: Any, base: Any, above: tuple[Settings, ...]) -> Group:
    sources = _sources(where, models)
    if base is not None and all(source.model != base for source in sources):
        sources.append(Source("base_model", base, None, implicit=True))
    return Group(where, tuple(sources), base, above)
