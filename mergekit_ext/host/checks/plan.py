"""What a merge would write, tensor by tensor, and where each tensor is in the inputs.

mergekit's planner runs, recording instead of planning. It and the private functions used with it
are not public API; this is the only file of the checks that builds on them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.plan import MergePlanner

from mergekit_ext.errors import did_you_mean, join, listing
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import wants_tokenizer
from mergekit_ext.host.class_model import class_of
from mergekit_ext.io.headers import TensorHeader

# What to do where mergekit's plan has other names than the files.
BY_FILES = (
    "Use `merge_method: flexmerge` (with `target_size: 1` for one model), or merge the weight "
    "files with mergekit-pytorch and copy config.json and the tokenizer beside the result: both "
    "take the names in the files."
)
# With so many tensors of a model missing, whether others can be made of what is stored, a
# question to all of its names, changes nothing any more.
_ENOUGH_MISSING = 100


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        weight: mergekit's `WeightInfo` of the output.
        inputs: the models and what is read from each.
        base: the base of its group, or None.
        sources: gives the parameter mappings for a model (None: the shared ones).
        t: the position between the first layer and the last, for gradients.
        group: `Group.where`.
    """

    weight: Any
    inputs: tuple[tuple[Any, Any], ...]
    base: Any
    sources: Callable[[Any], Iterable[Any]]
    t: float
    group: str


@dataclass(frozen=True)
class FoundTensor:
    """A planned tensor and what the inputs hold for it.

    Attributes:
        planned: the tensor of the output.
        found: the models that have it, with the header, or None where its shape is not known.
        missing: the models that do not have it.
    """

    planned: PlannedTensor
    found: Mapping[Any, TensorHeader | None]
    missing: tuple[Any, ...]

    @property
    def name(self) -> str:
        """What the output calls it."""
        name: str = self.planned.weight.name
        return name

    @property
    def headers(self) -> list[TensorHeader]:
        """The known headers."""
        return [header for header in self.found.values() if header is not None]

    def without(self, models: Collection[Any]) -> FoundTensor:
        """Return the same tensor as if `models` were not there."""
        found = {model: header for model, header in self.found.items() if model not in models}
        return FoundTensor(self.planned, found, tuple(m for m in self.missing if m not in models))


@dataclass
class Inventory:
    """What is known of a merge from its configuration and the headers of its inputs.

    Attributes:
        config, options: mergekit's.
        method: the registered merge method; None if there is none of that name.
        findings: what is wrong with the models, and what is worth knowing.
        models: every model that is merged.
        planned: the tensors of the output, optional ones included.
        located: those that are written, with what the inputs hold for them.
        out_config: the output's transformers configuration; None where there is no plan.
    """

    config: Any
    options: Any
    method: Any
    findings: Findings
    models: Mapping[Any, ModelFacts]
    planned: list[PlannedTensor] = field(default_factory=list)
    located: list[FoundTensor] = field(default_factory=list)
    out_config: Any = None

    @property
    def aligned(self) -> bool:
        """Whether vocabularies are made equal before the merge (a tokenizer, or truncation)."""
        return wants_tokenizer(self.config) or bool(self.options.unsafe_truncate_embeddings)

    @property
    def complete(self) -> bool:
        """Whether every model is known, and nothing is wrong with any."""
        known = all(fact.tensors is not None for fact in self.models.values())
        return known and bool(self.located) and not self.findings.count


def survey(inventory: Inventory, architecture: Any) -> None:
    """Plan every tensor of the output, as far as its models can be read."""
    from mergekit.merge import _model_out_config

    options, findings = inventory.options, inventory.findings
    copy = inventory.config.model_copy(deep=True)  # mergekit's planner rewrites it
    _check_modules(copy, architecture, findings)
    where = _keep_usable(copy, {m for m, f in inventory.models.items() if f.config is not None})
    # The planner looks the method up; its name may be wrong, and it is not needed here.
    copy.merge_method = "linear"
    if not (copy.models or copy.slices or copy.modules):
        return
    try:
        out_config = _model_out_config(copy, architecture, options.trust_remote_code)
        planner = _Recorder(copy, architecture, options, out_config)
        inventory.planned = planner.record(inventory.models, where, findings)
        inventory.out_config = out_config
    except Exception as error:  # mergekit's planner; its message is kept, without the config.json
        text = re.sub(r"\{.*\}", "{...}", str(error), flags=re.DOTALL)
        findings.problem(
            "the merge's plan",
            f"an error of mergekit ({type(error).__name__}: {text})",
            "a configuration that mergekit can plan",
            f"Mend the other problems first. If this is the only one: {BY_FILES}",
        )


class _Recorder(MergePlanner):
    """Walks over slices and layers as mergekit does and keeps what each tensor is made of."""

    def record(
        self, facts: Mapping[Any, ModelFacts], where: dict[int, str], findings: Findings
    ) -> list[PlannedTensor]:
        # Not through `_plan`, in which the project's own planner starts the statistics.
        self._facts, self._where, self._findings = facts, where, findings
        self._architectures: dict[Any, Any] = {}
        self.planned: list[PlannedTensor] = []
        self._method = self  # whose contract is checked elsewhere and in full
        flat = bool(self.config.models)
        self.normalize_config()
        for name, module in self.config.modules.items():
            for piece in module.slices:  # those that mergekit has just made of `models:`
                where.setdefault(id(piece), "models" if flat else f"modules.{name}.models")
            self.plan_module(name, module)
        return self.planned

    def validate_inputs(self, *_args: Any, **_kwargs: Any) -> None:
        """Accept anything, as the method that mergekit asks."""

    def _model_arch(self, model: Any) -> Any:
        # mergekit's own version keeps planner and models alive in a global cache.
        from mergekit.architecture.base import ConfiguredModelArchitecture

        if model not in self._architectures:
            self._architectures[model] = ConfiguredModelArchitecture(
                info=self.arch_info, config=self._facts[model].config
            )
        return self._architectures[model]

    def plan_slice(self, definition: Any, module_def: Any, module_name: str) -> None:
        """Refuse wrong layer ranges before mergekit stumbles over them."""
        module = self.arch_info.modules[module_name].architecture
        if self._layers_fit(definition.sources, module, self._where[id(definition)]):
            super().plan_slice(definition, module_def, module_name)

    def plan_tensor(
        self, weight: Any, weights_in: list[Any], models: list[Any], cfg_reader: Any
    ) -> None:
        """Record; no parameter is resolved and no file is opened."""
        self.planned.append(
            PlannedTensor(
                weight=weight,
                inputs=tuple(zip(models, weights_in, strict=False)),
                base=cfg_reader.base_model,
                sources=cfg_reader.parameter_sources,
                t=cfg_reader.t,
                group=self._where[id(cfg_reader.slice_out)],
            )
        )

    def _layers_fit(self, sources: list[Any], module: Any, where: str) -> bool:
        lengths: dict[str, int] = {}
        fits, chosen = True, "slices" in where
        for i, source in enumerate(sources):
            first, last = source.layer_range
            lengths[str(source.model)] = last - first
            layers = module.num_layers(self._facts[source.model].config)
            if chosen and not 0 <= first < last <= layers:
                fits = False
                self._findings.problem(
                    f"{where}.sources[{i}].layer_range",
                    f"[{first}, {last}]",
                    f"a range inside of [0, {layers}], the layers of {source.model}",
                    "Mend the range; its end is not included.",
                )
        if fits and len(set(lengths.values())) > 1:
            fits = False
            counts = ", ".join(f"{count} of {model}" for model, count in lengths.items())
            self._findings.problem(
                where,
                f"different numbers of layers: {counts}",
                "the same number from every model",
                "Make the `layer_range:` of all sources equally long."
                if chosen
                else "Choose layers with `slices:` and a `layer_range:` of one length.",
            )
        return fits


def _check_modules(config: Any, architecture: Any, findings: Findings) -> None:
    """Compare ``modules:`` with the architecture's, and take unknown ones out of `config`."""
    known = set(architecture.modules)
    if config.slices and len(known) != 1:
        findings.problem(
            "slices",
            f"`slices:` for an architecture with the modules {', '.join(sorted(known))}",
            "`modules:`, with slices or models for each of them",
            "Move the slices under `modules:`.",
        )
        config.slices = None
    for name in [name for name in config.modules or {} if name not in known]:
        findings.problem(
            f"modules.{name}",
            "a module that the architecture does not have",
            f"one of {', '.join(sorted(known))}",
            did_you_mean(name, known),
        )
        del config.modules[name]
    if config.modules and (left := sorted(known - set(config.modules))):
        findings.note(f"modules: the output will have no weights of {', '.join(left)}.")


def _keep_usable(config: Any, usable: Collection[Any]) -> dict[int, str]:
    """Take every model that cannot be read out of `config`, which is changed.

    Returns the paths of the slices in the user's file, by identity: indices shift here.
    """
    if config.base_model not in usable:
        config.base_model = None
    where: dict[int, str] = {}
    named = {f"modules.{name}.": module for name, module in (config.modules or {}).items()}
    for path, part in {"": config, **named}.items():
        if part.models:
            part.models = [item for item in part.models if item.model in usable]
        kept = []
        for i, piece in enumerate(part.slices or ()):
            piece.sources = [source for source in piece.sources if source.model in usable]
            if piece.base_model not in usable:
                piece.base_model = None
            if piece.sources:
                where[id(piece)] = join(f"{path}slices", i)
                kept.append(piece)
        part.slices = kept or None
    for name, module in list((config.modules or {}).items()):
        if not (module.models or module.slices):
            del config.modules[name]
    return where


def locate(inventory: Inventory) -> None:
    """Find each planned tensor in its inputs, as mergekit will. Leaves out what it would skip."""
    facts = inventory.models
    lacking: Counter[Any] = Counter()  # tensors without which no model is merged
    for tensor in inventory.planned:
        # mergekit leaves an optional weight out unless one input has its name or an alias.
        if tensor.weight.optional and not any(
            facts[model].tensors is None or _stored(facts[model], weight, tied=False) is not None
            for model, weight in tensor.inputs
        ):
            continue
        found: dict[Any, TensorHeader | None] = {}
        missing = []
        for model, weight in tensor.inputs:
            header = _stored(facts[model], weight, tied=True)
            hopeless = not weight.optional and lacking[model] >= _ENOUGH_MISSING
            if (
                header is None
                and facts[model].tensors is not None
                and (hopeless or not _converted(facts[model], weight))
            ):
                missing.append(model)
                lacking[model] += not weight.optional
            else:
                found[model] = header
        inventory.located.append(FoundTensor(tensor, found, tuple(missing)))


def left_out(inventory: Inventory) -> list[str]:
    """Name the stored tensors that the merge does not use, and which the output will not have.

    Whether the output's class needs them is for `check_output`. What a class from elsewhere
    needs is not known: there each of them is a problem. Returns all of these names.
    """
    planned, findings = inventory.planned, inventory.findings
    used: dict[Any, set[str]] = {model: set() for model in inventory.models}
    for tensor in planned:
        for model, weight in tensor.inputs:
            used[model].update(_names(weight, tied=True))
    merged = {id(tensor.planned) for tensor in inventory.located}
    skipped = sorted(tensor.weight.name for tensor in planned if id(tensor) not in merged)
    lost: dict[tuple[str, ...], list[ModelFacts]] = {}
    unused: dict[str, None] = {}
    for model, fact in inventory.models.items():
        rest = sorted(set(fact.tensors or ()) - used[model])
        if not rest or not used[model]:
            continue
        unused.update(dict.fromkeys(rest))
        if class_of(fact.config) is None:
            lost.setdefault(tuple(rest), []).append(fact)
        elif not _has_conversions(fact):  # converted names look like extra ones
            findings.note(f"{model}: the merge does not use {listing(rest)}.")
    for names, owners in lost.items():
        instead = f" (it looks for {listing(skipped)})" if skipped else ""
        findings.problem(
            owners[0].where,
            f"{len(names)} tensors of {', '.join(str(fact.reference) for fact in owners)} that "
            f"mergekit's plan leaves out{instead}: {listing(names)}",
            "a use for every stored tensor, because the model's class is not one of transformers",
            BY_FILES,
        )
    return list(unused)


def _names(weight: Any, *, tied: bool) -> list[str]:
    names = [weight.name, *(weight.aliases or ())]
    return names + list(weight.tied_names or ()) if tied else names


def _stored(fact: ModelFacts, weight: Any, *, tied: bool) -> TensorHeader | None:
    stored = fact.tensors or {}
    return next((stored[n] for n in _names(weight, tied=tied) if n in stored), None)


def _has_conversions(fact: ModelFacts) -> bool:
    kind = getattr(fact.config, "model_type", None)
    return bool(kind) and _converts(kind)


@functools.cache
def _converts(model_type: str) -> bool:
    """Asked for every tensor; transformers copies the whole mapping each time."""
    from mergekit.architecture.conversion import get_checkpoint_conversion_mapping

    return bool(get_checkpoint_conversion_mapping(model_type))


def _converted(fact: ModelFacts, weight: Any) -> bool:
    """Whether mergekit makes the tensor from others (transformers' renamed layouts)."""
    if not _has_conversions(fact):
        return False
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    stored = set(fact.tensors or ())
    return any(
        can_convert_checkpoint_keys(fact.config.model_type, stored, name)
        for name in _names(weight, tied=False)
    )
