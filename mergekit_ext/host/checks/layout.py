"""Where everything is in a configuration, before mergekit rewrites it.

mergekit turns ``models:`` and ``slices:`` into ``modules:`` before it plans, so that paths in its
own errors are not those of the user's file. Here each group of inputs keeps its path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit_ext.core.wording import join


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
    layer_range: tuple[int, int] | None = None
    implicit: bool = False


@dataclass(frozen=True)
class Group:
    """Inputs that are merged with each other, and the mappings above them, narrowest first."""

    where: str
    sources: tuple[Source, ...]
    base: Any
    settings: tuple[Settings, ...]

    def source(self, model: Any) -> Source | None:
        """The first source with this model."""
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
        """The path at which a shared parameter of this group is looked for first."""
        return self.settings[0].where if self.settings else "parameters"


def groups_of(config: Any) -> list[Group]:
    """The groups of a `MergeConfiguration`, or of mergekit-pytorch's configuration."""
    top = _settings("parameters", config.parameters)
    base = config.base_model
    if config.models:
        return [_models_group("models", config.models, base, top)]
    found: list[Group] = []
    for i, piece in enumerate(getattr(config, "slices", None) or ()):
        found.append(_slice_group(join("slices", i), piece, base, top))
    for name, module in (getattr(config, "modules", None) or {}).items():
        where = f"modules.{name}"
        above = _settings(f"{where}.parameters", module.parameters) + top
        if module.models:
            found.append(_models_group(f"{where}.models", module.models, base, above))
        for i, piece in enumerate(module.slices or ()):
            found.append(_slice_group(join(f"{where}.slices", i), piece, base, above))
    return found


def all_settings(groups: list[Group]) -> list[tuple[Group, Settings]]:
    """Every ``parameters:`` mapping once, with a group that it acts on."""
    found: dict[str, tuple[Group, Settings]] = {}
    for group in groups:
        for settings in group.settings:
            found.setdefault(settings.where, (group, settings))
        for source in group.sources:
            if source.settings is not None:
                found.setdefault(source.settings.where, (group, source.settings))
    return list(found.values())


def references(groups: list[Group], base: Any) -> Iterator[tuple[str, Any]]:
    """Every model of the configuration once, with the place that names it first."""
    seen = set()
    for group in groups:
        for source in group.sources:
            if source.model not in seen:
                seen.add(source.model)
                yield source.where + ("" if source.implicit else ".model"), source.model
        if group.base is not None and group.base not in seen:
            seen.add(group.base)
            yield ("base_model" if group.base == base else f"{group.where}.base_model"), group.base


def _settings(where: str, values: Mapping[str, Any] | None) -> tuple[Settings, ...]:
    return (Settings(where, values),) if values else ()


def _source(where: str, item: Any) -> Source:
    values = item.parameters
    settings = Settings(f"{where}.parameters", values, item.model) if values else None
    layers = getattr(item, "layer_range", None)
    return Source(where, item.model, settings, tuple(layers) if layers is not None else None)


def _models_group(where: str, models: Any, base: Any, above: tuple[Settings, ...]) -> Group:
    sources = [_source(join(where, i), item) for i, item in enumerate(models)]
    if base is not None and all(s.model != base for s in sources):
        sources.append(Source("base_model", base, None, implicit=True))
    return Group(where, tuple(sources), base, above)


def _slice_group(where: str, piece: Any, base: Any, above: tuple[Settings, ...]) -> Group:
    at = f"{where}.sources"
    sources = tuple(_source(join(at, i), item) for i, item in enumerate(piece.sources))
    own = _settings(f"{where}.parameters", piece.parameters)
    return Group(where, sources, piece.base_model or base, own + above)
