"""What a merge is planned with where mergekit has no table that fits: the names in the files.

mergekit's planner takes an architecture: modules, which have layers with a list of tensors each.
The one made here has the tensors of one model's headers; `blocks.layer_of` finds layers in names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit.architecture import ModelArchitecture, ModuleArchitecture, WeightInfo
from mergekit.architecture.base import ModuleDefinition
from mergekit.common import get_config_value

from mergekit_ext.host.blocks import Layer, blocks_of, layer_of
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.naming import Headers, as_in, complete_ties, is_tied
from mergekit_ext.io.class_model import ClassNames, class_names, loading

# Where a configuration counts the layers of a stack, by a part of the stack's name.
_COUNTS: Sequence[tuple[re.Pattern[str], Sequence[str]]] = (
    (re.compile("vision|visual"), ("vision_config.num_hidden_layers", "vision_config.depth")),
    (re.compile("text|language"), ("text_config.num_hidden_layers",)),
    (re.compile("decoder"), ("decoder_layers", "num_decoder_layers")),
    (re.compile("encoder"), ("encoder_layers", "num_layers")),
    (re.compile(""), ("num_hidden_layers",)),
)


@dataclass(frozen=True)
class Settled:
    """What the checks of a merge have settled for its planner."""

    architecture: ModelArchitecture | None = None  # None: mergekit's own choice
    # Tensors of the output that are taken from one model, as they are.
    copied: Mapping[str, Any] = field(default_factory=dict)


_settled: ContextVar[Settled | None] = ContextVar("settled", default=None)


@contextmanager
def settling(found: Settled) -> Iterator[None]:
    """Plan with what the checks have `found`."""
    token = _settled.set(found)
    try:
        yield
    finally:
        _settled.reset(token)


def settled() -> Settled:
    """Return what the checks of the merge that is running have found."""
    return _settled.get() or Settled()


def chosen(stock: Callable[..., Any], config: Any, options: Any) -> Any:
    """Extend ``get_architecture_info``: what the checks have planned with."""
    return settled().architecture or stock(config, options)


@dataclass(frozen=True)
class NamedModule(ModuleArchitecture):
    """The tensors of one stack of layers, and others before and after it.

    All layers have one list of tensors, by what follows the number of the layer in their names. A
    tensor that not every layer has is optional: mergekit leaves it out where no input has it.
    """

    before: Sequence[WeightInfo] = ()
    after: Sequence[WeightInfo] = ()
    stack: str = ""
    inner: Sequence[str] = ()
    known: Mapping[str, WeightInfo] = field(default_factory=dict)
    layers: int = 0
    key: str | None = None  # of the number of layers in a configuration

    def pre_weights(self, config: Any) -> list[WeightInfo]:
        return list(self.before)

    def post_weights(self, config: Any) -> list[WeightInfo]:
        return list(self.after)

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
        names = (f"{self.stack}.{index}.{inner}" for inner in self.inner)
        return [self.known.get(name) or WeightInfo(name=name, optional=True) for name in names]

    def num_layers_config_key(self) -> str:
        return self.key or ""

    def num_layers(self, config: Any) -> int:
        return int(get_config_value(config, self.key)) if self.key else self.layers


@dataclass(frozen=True)
class _Stored:
    """The tensors of one file, by what its class makes of them."""

    fact: ModelFacts
    names: ClassNames
    unknown: Collection[str]  # what the class does not have
    joined: Collection[str]  # what mergekit's loader makes `made` of, such as experts one by one
    made: Sequence[str]


def from_headers(
    facts: Mapping[Any, ModelFacts], donor: Any
) -> tuple[ModelArchitecture, dict[Any, Sequence[str]]]:
    """Return an architecture with the tensors of `donor`, and what other models have besides.

    Names are those in the donor's file. Where transformers joins stored tensors (experts that are
    stored one by one), and mergekit's loader does, the joined ones are planned instead: one model
    may store a stack and another its parts. Tensors that the donor's class does not have are
    planned if all models have them in one shape.
    """
    mine, *others = (_stored(facts[m]) for m in (donor, *(m for m in facts if m != donor)))
    headers, config = mine.fact.tensors or {}, mine.fact.config
    named: list[Headers] = [headers, headers]
    named += [as_in((o.fact.tensors or {}, o.fact.config), [(headers, config)])[0] for o in others]
    _, *owners = complete_ties(named, is_tied([fact.config for fact in facts.values()]))
    alike = {
        name
        for name in mine.unknown
        if all(name in o and o[name].shape == headers[name].shape for o in owners)
    }
    dropped = {*mine.joined, *mine.unknown} - alike
    names = list(blocks_of({*owners[0], *mine.made} - dropped, "tensor", False))
    axes = _vocabulary_axes(mine)
    weights = {}
    for name in names:
        stored = {owner[name].name for owner in owners if name in owner} - {name}
        aliases = tuple(sorted(stored)) or None
        weights[name] = WeightInfo(name=name, vocabulary_axis=axes.get(name), aliases=aliases)
    pairs = zip((mine, *others), owners, strict=True)
    counted = [(model.fact.config, {*owner, *model.made}) for model, owner in pairs]
    modules = _modules(weights, mine.made, counted)
    planned = {(m.stack, inner) for m in modules.values() for inner in m.inner}
    has_text = getattr(config, "text_config", None) is not None
    besides: dict[Any, Sequence[str]] = {}
    for model, owner in zip(others, owners[1:], strict=True):
        ignored = {*model.unknown, *model.joined}
        rest = [n for n, h in owner.items() if n not in weights and h.name not in ignored]
        besides[model.fact.reference] = [n for n in rest if _kind(n) not in planned]
    architecture = ModelArchitecture(
        modules={n: ModuleDefinition(architecture=m) for n, m in modules.items()},
        architectures=[],
        model_type="",
        vocab_size_config_key="text_config.vocab_size" if has_text else None,
    )
    return architecture, besides


def _stored(fact: ModelFacts) -> _Stored:
    stored = fact.tensors or {}
    names = class_names(stored, fact.config)
    if names.model is None:
        return _Stored(fact, names, (), (), ())
    state = names.model.state_dict()
    unknown = {name for name, own in names.of.items() if own not in state}
    joined = {name for name in unknown if names.of[name] in names.converted}
    made: Sequence[str] = ()
    if joined:
        from mergekit.architecture.conversion import can_convert_checkpoint_keys

        kind, lacking = fact.config.model_type, [n for n in state if n not in {*names.of.values()}]
        # Of the layers of a stack one stands for all.
        sample = {_kind(name): name for name in lacking}
        can = {k: can_convert_checkpoint_keys(kind, {*stored}, n) for k, n in sample.items()}
        made = [name for name in lacking if can[_kind(name)]]
        shapes = {name: h.shape for name, h in stored.items() if name not in joined}
        found = loading(fact.config, {**shapes, **{n: tuple(state[n].shape) for n in made}})
        if found is None or fact.loading is None or {*found.missing} - {*fact.loading.missing}:
            made = ()
    return _Stored(fact, names, unknown - joined, joined if made else (), made)


def _layer(name: str) -> Layer | None:
    """Return where a tensor sits; None outside of layers, and for a number such as 01."""
    layer = layer_of(name)
    is_plain = layer is not None and f"{layer.stack}.{layer.depth}.{layer.rest}" == name
    return layer if is_plain else None


def _kind(name: str) -> tuple[str, str]:
    """Return what tensors of all layers of a stack have in common, which differs from others."""
    layer = _layer(name)
    return ("", name) if layer is None else (layer.stack, layer.rest)


def _vocabulary_axes(stored: _Stored) -> dict[str, int]:
    """Return the axis of tokens of stored embeddings, as far as the class says which those are."""
    if stored.names.model is None:
        return {}
    from mergekit.architecture.auto import infer_vocabulary_axes

    try:
        axes = infer_vocabulary_axes(stored.names.model)
    except (NotImplementedError, AttributeError):  # of a class without, or with two
        return {}
    return {name: axes[own] for name, own in stored.names.of.items() if own in axes}


def _modules(
    weights: Mapping[str, WeightInfo],
    made: Collection[str],
    models: Sequence[tuple[Any, Collection[str]]],
) -> dict[str, NamedModule]:
    """Return one module, called default, for one stack; else one more for each stack, by its name.

    `models` are the configurations of all models, and the names of their tensors. mergekit looks
    for optional tensors by name: those that are `made` while reading are not optional.
    """
    depths: dict[str, set[int]] = defaultdict(set)
    for name in weights:
        if layer := _layer(name):
            depths[layer.stack].add(layer.depth)
    # A stack has a layer for each number: one with gaps is not planned through.
    stacks = {stack for stack, at in depths.items() if at == set(range(len(at)))}
    layered = {n: layer for n in weights if (layer := _layer(n)) and layer.stack in stacks}
    found = {}
    for stack in sorted(stacks):
        mine = {name: layer.rest for name, layer in layered.items() if layer.stack == stack}
        everywhere = Counter(mine.values())
        count = len(depths[stack])
        known = {
            name: weights[name].model_copy(
                update={"optional": everywhere[inner] < count and name not in made}
            )
            for name, inner in mine.items()
        }
        inners = tuple(dict.fromkeys(mine.values()))
        found[stack] = NamedModule((), (), stack, inners, known, count, _key(stack, models))
    loose = [weight for name, weight in weights.items() if name not in layered]
    if len(found) != 1:
        return {"default": NamedModule(loose), **found}
    (only,) = found.values()
    first = next(at for at, name in enumerate(weights) if name in layered)
    split = sum(name not in layered for name in list(weights)[:first])
    return {"default": replace(only, before=loose[:split], after=loose[split:])}


def _key(stack: str, models: Sequence[tuple[Any, Collection[str]]]) -> str | None:
    """Return where the configurations count the layers of a stack; None if they do not."""
    counts = [
        (config, len({at.depth for n in names if (at := _layer(n)) and at.stack == stack}))
        for config, names in models
    ]

    def counted(config: Any, key: str) -> Any:
        try:
            return get_config_value(config, key)
        except RuntimeError:
            return None

    for part, keys in _COUNTS:
        for key in keys if part.search(stack) else ():
            if all(counted(config, key) == count for config, count in counts):
                return key
    return None
