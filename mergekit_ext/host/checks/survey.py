"""What a merge would do, tensor by tensor: mergekit's planner, recording instead of planning.

mergekit's planner, and the two private functions used with it here, are not public API; this is
the only file of the checks that builds on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.plan import MergePlanner

from mergekit_ext.core.wording import did_you_mean, join
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings


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


class _AnyInputs:
    """Stands in for the method, whose contract is checked elsewhere and in full."""

    def validate_inputs(self, *_args: Any, **_kwargs: Any) -> None:
        """Accept anything."""


class SurveyPlanner(MergePlanner):
    """Walks over slices and layers as mergekit does and keeps what each tensor is made of."""

    def __init__(
        self,
        config: Any,
        architecture: Any,
        options: Any,
        out_config: Any,
        facts: Mapping[Any, ModelFacts],
        where: Mapping[int, str],
        findings: Findings,
    ):
        super().__init__(config, architecture, options, out_config)
        self._method = _AnyInputs()
        self._facts, self._findings = facts, findings
        self._architectures: dict[Any, Any] = {}
        self._where = dict(where)
        self.planned: list[PlannedTensor] = []

    def survey(self) -> list[PlannedTensor]:
        """Walk; returns every tensor of the output, optional ones included."""
        # Not through `_plan`, in which the project's own planner starts the statistics.
        self.normalize_config()
        for name, module in self.config.modules.items():
            self.plan_module(name, module)
        return self.planned

    def normalize_config(self) -> None:
        """As mergekit does it, remembering how the user's file calls each slice."""
        flat = bool(self.config.models)
        super().normalize_config()
        for name, module in self.config.modules.items():
            for piece in module.slices:  # those that mergekit has just made of `models:`
                self._where.setdefault(id(piece), "models" if flat else f"modules.{name}.models")

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
        where = self._where[id(definition)]
        if self._layers_fit(definition.sources, module_name, where):
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

    def _layers_fit(self, sources: list[Any], module_name: str, where: str) -> bool:
        module = self.arch_info.modules[module_name].architecture
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
                "Choose layers with `slices:` and a `layer_range:` of one length."
                if not chosen
                else "Make the `layer_range:` of all sources equally long.",
            )
        return fits


def check_modules(config: Any, architecture: Any, findings: Findings) -> None:
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
    for name in list(config.modules or {}):
        if name not in known:
            findings.problem(
                f"modules.{name}",
                "a module that the architecture does not have",
                f"one of {', '.join(sorted(known))}",
                did_you_mean(name, known),
            )
            del config.modules[name]
    left_out = sorted(known - set(config.modules)) if config.modules else []
    if left_out:
        findings.note(f"modules: the output will have no weights of {', '.join(left_out)}.")


def keep_usable(config: Any, usable: Mapping[Any, ModelFacts]) -> dict[int, str]:
    """Take every model that cannot be read out of `config`, which is changed.

    Returns the paths of the slices in the user's file, by identity: indices shift here.
    """
    if config.base_model not in usable:
        config.base_model = None
    if config.models:
        config.models = [item for item in config.models if item.model in usable]
    where: dict[int, str] = {}
    config.slices = _usable_slices(config.slices, "slices", usable, where)
    for name, module in list((config.modules or {}).items()):
        if module.models:
            module.models = [item for item in module.models if item.model in usable]
        module.slices = _usable_slices(module.slices, f"modules.{name}.slices", usable, where)
        if not (module.models or module.slices):
            del config.modules[name]
    return where


def _usable_slices(
    slices: Any, path: str, usable: Mapping[Any, ModelFacts], where: dict[int, str]
) -> list[Any] | None:
    kept = []
    for i, piece in enumerate(slices or ()):
        piece.sources = [source for source in piece.sources if source.model in usable]
        if piece.base_model not in usable:
            piece.base_model = None
        if piece.sources:
            where[id(piece)] = join(path, i)
            kept.append(piece)
    return kept or None


def survey(
    config: Any,
    architecture: Any,
    options: Any,
    facts: Mapping[Any, ModelFacts],
    findings: Findings,
) -> tuple[list[PlannedTensor], Any]:
    """Every tensor that the merge would write, as far as its models can be read.

    The second value is the output's transformers configuration; None where there is no plan.
    """
    from mergekit.merge import _model_out_config

    usable = {model: fact for model, fact in facts.items() if fact.config is not None}
    copy = config.model_copy(deep=True)  # mergekit's planner rewrites it
    check_modules(copy, architecture, findings)
    where = keep_usable(copy, usable)
    # The planner looks the method up; its name may be wrong, and it is not needed here.
    copy.merge_method = "linear"
    if not (copy.models or copy.slices or copy.modules):
        return [], None
    try:
        out_config = _model_out_config(copy, architecture, options.trust_remote_code)
        planner = SurveyPlanner(copy, architecture, options, out_config, usable, where, findings)
        return planner.survey(), out_config
    except Exception as error:  # mergekit's planner; its message is kept, without the config.json
        from mergekit_ext.host.checks.locate import BY_FILES  # not with the module: it loads this

        text = re.sub(r"\{.*\}", "{...}", str(error), flags=re.DOTALL)
        findings.problem(
            "the merge's plan",
            f"an error of mergekit ({type(error).__name__}: {text})",
            "a configuration that mergekit can plan",
            f"Mend the other problems first. If this is the only one: {BY_FILES}",
        )
        return [], None
