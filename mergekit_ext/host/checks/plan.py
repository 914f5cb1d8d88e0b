"""What a merge would write, tensor by tensor, and where each tensor is in the inputs.

mergekit's planner runs, recording instead of planning. It and the private functions used with it
are not public API; this is the only file of the checks that builds on them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.architecture.base import ConfiguredModelArchitecture
from mergekit.plan import MergePlanner

from mergekit_ext.errors import did_you_mean, join, listing, one_line
from mergekit_ext.host.architecture import Settled, from_headers
from mergekit_ext.host.blocks import is_task_head
from mergekit_ext.host.checks.layout import Group, groups_of
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import wants_tokenizer
from mergekit_ext.host.inputs import HEADS, donor_of, named_model
from mergekit_ext.io.class_model import Loading, loading
from mergekit_ext.io.headers import TensorHeader

# With so many tensors of a model missing, whether others can be made of what is stored, a
# question to all of its names, changes nothing any more.
_ENOUGH_MISSING = 100


@dataclass
class PlannedTensor:
    """One tensor of the output, and what the inputs hold for it."""

    weight: Any  # mergekit's `WeightInfo` of the output
    inputs: Mapping[Any, Any]  # the same of what is read from each model
    group: Group
    sources: Callable[[Any], Iterable[Any]]  # the parameter mappings for a model, or for None
    t: float = 0.0  # the position between the first layer and the last, for gradients
    # The models that have it, with the header, or None where its shape is not known.
    found: Mapping[Any, TensorHeader | None] = field(default_factory=dict)
    missing: tuple[Any, ...] = ()  # the models that do not have it
    copied: bool = False  # whether it is the only input's, as it is

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def headers(self) -> list[TensorHeader]:
        """The known headers."""
        return [header for header in self.found.values() if header is not None]

    def take(self, model: Any) -> None:
        """Leave `model` as the only input, whose tensor the output has."""
        self.inputs, self.found = {model: self.inputs[model]}, {model: self.found[model]}
        self.missing, self.copied = (), True


@dataclass
class Inventory:
    """What is known of a merge from its configuration and the headers of its inputs."""

    config: Any
    options: Any
    method: Any  # the registered merge method; None if there is none of that name
    findings: Findings
    models: dict[Any, ModelFacts] = field(default_factory=dict)
    planned: list[PlannedTensor] = field(default_factory=list)  # with optional ones
    located: list[PlannedTensor] = field(default_factory=list)  # those that are written
    out_config: Any = None  # the output's, of transformers; None where there is no plan
    architecture: Any = None  # what is planned with; None where that is mergekit's choice
    groups: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = self.findings.count
        self.groups = self.groups or groups_of(self.config)

    @property
    def settled(self) -> Settled:
        """What the planner is to do."""
        copied = {t.name: next(iter(t.inputs)) for t in self.located if t.copied}
        return Settled(self.architecture, copied)

    @property
    def aligned(self) -> bool:
        """Whether vocabularies are made equal before the merge (a tokenizer, or truncation)."""
        return wants_tokenizer(self.config) or bool(self.options.unsafe_truncate_embeddings)

    @property
    def is_sound(self) -> bool:
        """Whether no problem was found since this inventory was begun."""
        return self.findings.count == self._before


def plan_models(inventory: Inventory) -> bool:
    """Plan the tensors of whole models and find them; return whether the models are of one kind.

    Where mergekit has no table of the models' classes, or its plan would lose tensors, the plan has
    the names in the files.
    """
    known = {model: fact for model, fact in inventory.models.items() if fact.config is not None}
    if not known:
        return False
    infos = {model: arch_info_for_config(fact.config) for model, fact in known.items()}
    donor = donor_of(inventory.config)
    table = infos.get(donor, next(iter(infos.values())))
    crimes = inventory.options.allow_crimes
    if (alike := None not in infos.values() and all(i == table for i in infos.values())) or (
        table is not None and crimes
    ):
        trial = replace(inventory, findings=Findings(), planned=[], located=[])
        _survey(trial, table)
        locate(trial)
        if _is_whole(trial) or not _has_headers(inventory):
            inventory.planned, inventory.located = trial.planned, trial.located
            inventory.out_config, inventory.architecture = trial.out_config, table
            inventory.findings.absorb(trial.findings)
            return alike
    if same := len({fact.config.model_type for fact in known.values()}) == 1:
        _plan_by_files(inventory, donor)
    elif not crimes:
        listed = ", ".join(f"{fact.kind} in {model}" for model, fact in known.items())
        where, found = list(known.values())[-1].where, f"different architectures: {listed}"
        remedy = "Take out what does not fit, or give --allow-crimes to merge what has one name."
        inventory.findings.problem(where, found, "one architecture", remedy)
    return same


def _has_headers(inventory: Inventory) -> bool:
    facts = inventory.models.values()
    return all(fact.config is not None and fact.tensors is not None for fact in facts)


def _is_whole(trial: Inventory) -> bool:
    """Return whether a plan has all that its class needs, and nothing that no model has."""
    if not trial.planned:
        return False
    if not trial.is_sound:  # what is wrong is said in the words of the table
        return True
    if any(not tensor.found and not tensor.weight.optional for tensor in trial.located):
        return False
    if (found := output_loading(trial)) is not None:
        return not (found.missing or found.error)
    return not _unused(trial)


def _plan_by_files(inventory: Inventory, donor: Any) -> None:
    findings, kinds = inventory.findings, {f.kind for f in inventory.models.values() if f.config}
    named = ", ".join(sorted(kinds))
    if not _has_headers(inventory):
        findings.note(f"Tensors are not compared: those of all models with {named} are not known.")
        return
    findings.note(f"{named}: planned by the names in the files, which mergekit has no table of.")
    inventory.architecture, besides = from_headers(inventory.models, donor)
    _survey(inventory, inventory.architecture)
    locate(inventory)
    owners = {model: names for model, names in besides.items() if names}
    if named_model(inventory.config, HEADS) is not None:
        for model, names in owners.items():
            findings.note(f"{model}: the output has no {listing(names)}, as {donor} has none.")
    elif owners and inventory.method is not None:  # which may keep heads apart
        names = list(dict.fromkeys(name for names in owners.values() for name in names))
        first, *_ = owners
        what = f"{listing(names)} in {listing(list(map(str, owners)))}, which {donor} does not have"
        expected = "the same tensors in every model, or `heads:` with the model that gives them"
        own = f"`heads: {first}` (its tensors and its configuration; or those of another)"
        remedy = f"Under `parameters:` write {own}, or `heads: {donor}` (without them)."
        findings.problem(inventory.models[first].where, what, expected, remedy)


def _survey(inventory: Inventory, architecture: Any) -> None:
    """Plan every tensor of the output, as far as its models can be read."""
    from mergekit.merge import _model_out_config

    options, findings = inventory.options, inventory.findings
    copy = inventory.config.model_copy(deep=True)  # mergekit's planner rewrites it
    _check_modules(copy, set(architecture.modules), findings)
    places = _keep_usable(copy, {m for m, f in inventory.models.items() if f.config is not None})
    if not (copy.models or copy.slices or copy.modules):
        return
    # The planner looks the method up; its name may be wrong, and it is not needed here.
    copy.merge_method = "linear"
    try:
        out_config = _model_out_config(copy, architecture, options.trust_remote_code)
        _Recorder(copy, architecture, options, out_config).record(inventory, places)
        inventory.out_config = out_config
    except Exception as error:  # mergekit's planner; its message is kept
        inventory.planned.clear()
        found = f"an error of mergekit ({one_line(error)})"
        expected = "a configuration that mergekit can plan"
        remedy = "Mend that, and the other problems first."
        findings.problem("the merge's plan", found, expected, remedy)


class _Recorder(MergePlanner):
    """Walks over slices and layers as mergekit does and keeps what each tensor is made of."""

    def record(self, inventory: Inventory, places: Mapping[int, str]) -> None:
        """Plan into `inventory`; `places` are the paths of slices in the user's file, by `id`."""
        # Not through `_plan`, in which the project's own planner starts the statistics.
        self._inventory = inventory
        # mergekit's own version keeps planner and models alive in a global cache.
        self._model_arch = functools.cache(
            lambda model: ConfiguredModelArchitecture(
                info=self.arch_info, config=inventory.models[model].config
            )
        )
        # The method's contract is checked elsewhere and in full.
        self._method = SimpleNamespace(validate_inputs=lambda *_, **__: None)
        groups = {group.where: group for group in inventory.groups}
        flat = bool(self.config.models)
        self.normalize_config()
        self._groups: dict[int, Group] = {}
        for name, module in self.config.modules.items():
            for piece in module.slices:  # of which mergekit has just made some of `models:`
                at = places.get(id(piece), "models" if flat else f"modules.{name}.models")
                self._groups[id(piece)] = groups[at]
            self.plan_module(name, module)

    def plan_slice(self, definition: Any, module_def: Any, module_name: str) -> None:
        """Refuse wrong layer ranges before mergekit stumbles over them."""
        module = self.arch_info.modules[module_name].architecture
        findings, where = self._inventory.findings, self._groups[id(definition)].where
        fits, lengths = True, dict[str, int]()
        for i, source in enumerate(definition.sources):
            first, last = source.layer_range
            lengths[str(source.model)] = last - first
            layers = module.num_layers(self._inventory.models[source.model].config)
            if "slices" in where and not 0 <= first < last <= layers:
                fits = False
                at, found = f"{where}.sources[{i}].layer_range", f"[{first}, {last}]"
                expected = f"a range inside of [0, {layers}], the layers of {source.model}"
                findings.problem(at, found, expected, "Mend the range; its end is not included.")
        if fits and len(set(lengths.values())) > 1:
            fits = False
            counts = ", ".join(f"{count} of {model}" for model, count in lengths.items())
            found, expected = f"different numbers of layers: {counts}", "one for every model"
            remedy = "Choose layers with `slices:` and a `layer_range:` of one length for all."
            findings.problem(where, found, expected, remedy)
        if fits:
            super().plan_slice(definition, module_def, module_name)

    def plan_tensor(
        self, weight: Any, weights_in: list[Any], models: list[Any], cfg_reader: Any
    ) -> None:
        """Record; no parameter is resolved and no file is opened."""
        inputs = dict(zip(models, weights_in, strict=False))
        group, given = self._groups[id(cfg_reader.slice_out)], cfg_reader.parameter_sources
        self._inventory.planned.append(PlannedTensor(weight, inputs, group, given, cfg_reader.t))


def _check_modules(config: Any, known: set[str], findings: Findings) -> None:
    """Compare ``modules:`` with the architecture's, and take what does not fit out of `config`."""
    for name in sorted((config.modules or {}).keys() - known):
        found = "a module that the architecture does not have"
        expected = f"one of {', '.join(sorted(known))}"
        findings.problem(f"modules.{name}", found, expected, did_you_mean(name, known, listed=True))
        del config.modules[name]
    if config.modules and (left := sorted(known - config.modules.keys())):
        findings.note(f"modules: the output will have no weights of {', '.join(left)}.")


def _keep_usable(config: Any, usable: Collection[Any]) -> dict[int, str]:
    """Take every model that cannot be read out of `config`, which is changed.

    Returns the paths of the slices in the user's file, by identity: indices shift here.
    """
    if config.base_model not in usable:
        config.base_model = None
    places: dict[int, str] = {}
    modules = config.modules or {}
    for path, part in {"": config, **{f"modules.{n}.": m for n, m in modules.items()}}.items():
        part.models = [item for item in part.models or () if item.model in usable] or None
        for i, piece in enumerate(part.slices or ()):
            places[id(piece)] = join(f"{path}slices", i)
            piece.sources = [source for source in piece.sources if source.model in usable]
            if piece.base_model not in usable:
                piece.base_model = None
        part.slices = [piece for piece in part.slices or () if piece.sources] or None
    config.modules = {n: m for n, m in modules.items() if m.models or m.slices} or None
    return places


def locate(inventory: Inventory) -> None:
    """Find each planned tensor in its inputs, as mergekit will. Leaves out what it would skip."""
    facts = inventory.models
    lacking: Counter[Any] = Counter()  # tensors without which no model is merged
    for tensor in inventory.planned:
        optional = tensor.weight.optional
        # mergekit leaves an optional weight out unless one input has its name or an alias.
        if optional and not any(
            facts[model].tensors is None or _stored(facts[model], weight, tied=False)
            for model, weight in tensor.inputs.items()
        ):
            continue
        found: dict[Any, TensorHeader | None] = {}
        for model, weight in tensor.inputs.items():
            fact = facts[model]
            header = _stored(fact, weight, tied=True)
            hopeless = not optional and lacking[model] >= _ENOUGH_MISSING
            if header or fact.tensors is None or not (hopeless or not _converted(fact, weight)):
                found[model] = header
            else:
                lacking[model] += not optional
        tensor.found = found
        tensor.missing = tuple(model for model in tensor.inputs if model not in found)
        inventory.located.append(tensor)


def names_of(weight: Any, *, tied: bool) -> list[str]:
    """Return the names under which an input may hold a tensor; `tied`: also those of its ties."""
    return [weight.name, *(weight.aliases or ()), *((weight.tied_names or ()) if tied else ())]


def _stored(fact: ModelFacts, weight: Any, *, tied: bool) -> TensorHeader | None:
    stored = fact.tensors or {}
    return next((stored[n] for n in names_of(weight, tied=tied) if n in stored), None)


def _converted(fact: ModelFacts, weight: Any) -> bool:
    """Return whether mergekit makes the tensor from others (transformers' renamed layouts)."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    kind = getattr(fact.config, "model_type", None)
    stored, names = set(fact.tensors or ()), names_of(weight, tied=False)
    return any(can_convert_checkpoint_keys(kind, stored, name) for name in names)


def lacking(facts: Mapping[Any, ModelFacts], kind: str) -> frozenset[str]:
    """Return the poolers and heads of a class that all models of that class lack alike."""
    missing = [set(f.loading.missing) for f in facts.values() if f.loading and f.kind == kind]
    everywhere = set.intersection(*missing) if missing else set()
    return frozenset(name for name in everywhere if "pooler" in name or is_task_head(name))


def output_loading(inventory: Inventory) -> Loading | None:
    """Return what transformers makes of the planned output; None if that is not known.

    What the inputs' classes lack is not missing.
    """
    config, located = inventory.out_config, inventory.located
    if config is None or not located:
        return None
    found = loading(config, {t.name: t.headers[0].shape if t.headers else (0,) for t in located})
    if found is None:
        return None
    known = lacking(inventory.models, config.architectures[0])
    return replace(found, missing=tuple(name for name in found.missing if name not in known))


def _unused(inventory: Inventory) -> bool:
    """Return whether a stored tensor has no use, of models whose class is not known."""
    for model, fact in inventory.models.items():
        weights = [t.inputs[model] for t in inventory.planned if model in t.inputs]
        used = {name for weight in weights for name in names_of(weight, tied=True)}
        if fact.loading is None and (fact.tensors or {}).keys() - used:
            return True
    return False
