"""A base model and a LoRA of each task, as PEFT reads them, of a plan with residuals.

The class of the models says what PEFT adapts exactly (`peft_merge.layers`); everything else of a
task is in its adapter if it is the whole of some modules, and else the base's.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import listing
from mergekit_ext.flexmerge.decomposition import Decomposition
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.residual import LOW_RANK, OWN, SHARED, Residual
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.flexmerge.stored import Place
from mergekit_ext.flexmerge.writer import Files, Piece
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.naming import Stored
from mergekit_ext.io.class_model import class_names
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.planned_files import split, weight_names
from mergekit_ext.kernels.numerics import finite
from peft_merge.adapter import LoraAdapter, Update, cast
from peft_merge.io.merged import adapter_of
from peft_merge.io.write import PATTERNS, notes_of, page
from peft_merge.layers import Unit, config_of, owner_of, units_of

FOLDER = "base"  # of the base
# Of each adapter.
BASE_FIELD = (
    f"Its base is `../{FOLDER}`, loaded as below wherever both are. `base_model_name_or_path` is "
    "the repository, or the folder that the base was written to: change it when you move both, for "
    "classes that read it, such as `AutoPeftModel`."
)
# What vLLM's --max-lora-rank may be.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Forms:
    """How adapters of a class hold tensors, by the names of these in files.

    Attributes:
        treatments: of all that the tasks could share.
        units: what has a residual, by the class's names.
        biases: those of their modules that are a task's own; each is what `lora_B.bias` adds to.
        names: in the class, of what is in some adapter.
        private: for each task the same of what no other task has.
        private_bytes: of all these, and of what the base has that is not merged.
        models: of each task's class, on the meta device.
    """

    treatments: Mapping[str, str]
    units: Sequence[Unit]
    biases: frozenset[str]
    names: Mapping[str, str]
    private: Sequence[Mapping[str, str]]
    private_bytes: int
    models: Sequence[Any]

    @property
    def kinds(self) -> list[str]:
        """The name of each task's class."""
        return [type(model).__name__ for model in self.models]

    @cached_property
    def files(self) -> dict[str, str]:
        """Names in files by those in the class."""
        return {called: name for name, called in self.names.items()}

    @property
    def counts(self) -> list[dict[str, int]]:
        """Of each unit how many modules have factors of each tensor."""
        weights = ([self.files[name] for name, _ in unit.modules.values()] for unit in self.units)
        return [Counter(names) for names in weights]

    @property
    def held(self) -> set[str]:
        """What has a residual in every task: all units with a bias, or else the smallest one."""
        units = self.units if self.biases else [min(self.units, key=lambda unit: unit.numbers)]
        return {self.files[weight] for unit in units for weight in unit.weights}

    def saved(self, task: int) -> dict[str, str]:
        """Return what a task's adapter holds whole, by the class's names."""
        own = [n for n, kept in self.treatments.items() if kept == OWN and n not in self.biases]
        private = {called: name for name, called in self.private[task].items()}
        return {**{self.names[name]: name for name in own}, **private}


def forms_of(
    layout: Layout, models: Sequence[Stored], algorithm: Residual, findings: Findings
) -> Forms | None:
    """Return what adapters of these models hold; report what they cannot, and what that loses."""
    classes = [class_names(headers, config) for headers, config in models]
    first = classes[0]
    if any(each.model is None for each in classes):
        _problem(findings, "models whose class is not one of transformers", "those of its classes")
        return None
    models_of = [each.model for each in classes]
    converted = set().union(*(each.converted for each in classes))
    ties = (pair for each in models_of for pair in each.all_tied_weights_keys.items())
    without = converted.union(*ties)
    parts = [(block, part) for block in layout.blocks for part in block.parts]
    wanted = {part.name: algorithm.treatment(block, part) for block, part in parts}
    stored = {first.of[name]: name for name in wanted}
    low = {called for called, name in stored.items() if wanted[name] == LOW_RANK} - converted
    alike = [{unit.name: unit for unit in units_of(each)} for each in models_of]
    units = [
        unit
        for name, unit in alike[0].items()
        if low.issuperset(unit.weights) and all(each.get(name) == unit for each in alike)
    ]
    if not units:
        _problem(findings, "models without a matrix that PEFT adapts", "one at least")
        return None
    # PEFT has a place for the biases of all layers, or for none.
    biases = {stored.get(unit.bias or "", "") for unit in units}
    if {*map(wanted.get, biases)} != {OWN}:
        biases = set()
    own = {n for n, kept in wanted.items() if kept == OWN and first.of[n] not in without} - biases
    private: list[dict[str, str]] = []
    for task, each, headers in zip(layout.tasks, classes, layout.private, strict=True):
        has = each.model.state_dict()
        named = {h.name: each.of[h.name] for h in headers if each.of[h.name] in has}
        whole = _whole(each.model, {*map(first.of.__getitem__, own), *named.values()})
        own = {name for name in own if owner_of(first.of[name]) in whole}
        private.append({n: called for n, called in named.items() if owner_of(called) in whole})
        alone = [h.name for h in headers if h.floating and h.name in named.keys() - private[-1]]
        if alone:
            what = f"{listing(alone)} of {task}, which only a whole module could replace"
            _problem(findings, what, "private tensors that are all of their modules")
            return None
    treatments = {
        **dict.fromkeys(wanted, SHARED),
        **dict.fromkeys(own | biases, OWN),
        **{stored[weight]: LOW_RANK for unit in units for weight in unit.weights},
    }
    if lost := [name for name, kept in treatments.items() if kept != wanted[name]]:
        counts = {part.name: math.prod(part.shape) for _, part in parts}
        share = sum(map(counts.__getitem__, lost)) / sum(counts.values())
        findings.warn(
            f"No LoRA can hold {len(lost)} of {len(counts)} tensors, {share:.2%} of parameters; "
            f"tasks have the base's {listing(lost)}. `output: checkpoint` keeps them."
        )
    sizes = [h.nbytes for h in (*layout.given, *layout.private[0])]  # in the base
    for names_of, headers in zip(private, layout.private, strict=True):
        sizes += [header.nbytes for header in headers if header.name in names_of]
    return Forms(treatments, units, frozenset(biases), first.of, private, sum(sizes), models_of)


def _problem(findings: Findings, found: str, expected: str) -> None:
    remedy = "Write `output: checkpoint`, which holds everything."
    findings.problem("parameters.output", f"`adapters` of {found}", expected, remedy)


def _whole(model: Any, tensors: set[str]) -> set[str]:
    """Return the modules that `tensors` are all of, and whose names end those of no others."""
    # PEFT saves every module whose name ends with an entry of `modules_to_save`.
    modules = dict(model.named_modules())
    owners = {*map(owner_of, tensors)} - {""}
    found = {
        owner
        for owner in owners & modules.keys()
        if all(f"{owner}.{name}" in tensors for name in modules[owner].state_dict())
    }
    while more := {o for o in found if any(m.endswith(o) for m in modules.keys() - found)}:
        found -= more
    return found


def bare(plan: Plan) -> Plan:
    """Return a plan of the base alone."""
    groups = (replace(g, own=(), ranks={task: {} for task in g.tasks}) for (g,) in plan.groups)
    return Plan(tuple((group,) for group in groups), plan.size)


def base_pieces(pieces: Sequence[Piece], layout: Layout) -> list[Piece]:
    """Return what the base holds of the pieces of a bare plan: private tensors of the first task.

    All get one place.
    """
    home = Place("unified", tuple(range(len(layout.tasks))))
    return [
        replace(
            piece,
            entries=[(home, header) for _, header in piece.entries],
            tensors=((home, name, tensor) for _, name, tensor in piece.tensors),
        )
        for piece in pieces
        if all(place.tasks in (home.tasks, (0,)) for place, _ in piece.entries)
    ]


def base_files(entries: Mapping[Place, Sequence[TensorHeader]], limit: int) -> Files:
    """Return the files of the base, of at most `limit` bytes (0: one)."""
    ((place, own),) = entries.items()
    shards = split(own, limit)
    names = weight_names(len(shards))
    return {f"{FOLDER}/{n}": (place, shard) for n, shard in zip(names, shards, strict=True)}


def adapter_of_task(
    forms: Forms, plan: Plan, reader: BlockReader, residuals: Decomposition, task: int, base: str
) -> LoraAdapter:
    """Return what a plan keeps of a task, on the base in the folder `base`.

    Tensors are made when they are asked for.
    """
    layout, forced = reader.layout, residuals.storage.forced
    everyone, name_of = range(len(layout.tasks)), layout.tasks[task]
    parts = {part.name: part for block in layout.blocks for part in block.parts}
    ranks = {name: r for (group,) in plan.groups for name, r in group.ranks[task].items()}
    units = [unit for unit in forms.units if forms.files[unit.weights[0]] in ranks]
    infos, made_of = {}, {}
    for unit in units:
        for module, (weight, layer) in unit.modules.items():
            name, bias = forms.files[weight], bool(forms.biases)
            dtype = forced or parts[name].dtype(everyone)
            infos[module] = replace(layer.info, rank=ranks[name], bias=bias, dtype=dtype)
            made_of[module] = (name, layer.transposed, forms.files.get(unit.bias or ""))

    def whole(name: str) -> Tensor:
        tensor = finite(reader.tensor(task, name), name, name_of)
        return cast(tensor, forced, name) if forced and name in parts else tensor

    def change(name: str) -> Tensor:
        theta_0 = residuals.theta_0(name)
        wide = torch.promote_types(torch.float32, theta_0.dtype)
        return (whole(name).to(wide) - theta_0.to(wide)).to(theta_0.dtype)

    def update(module: str) -> Update:
        (name, transposed, trained), info = made_of[module], infos[module]
        b, a = residuals.factors(task, name, info.rank)
        if transposed:
            b, a = a.mT, b.mT
        bias = change(trained) if info.bias and trained else None
        return Update(a, b, 1.0, bias).filled(info.rank).cast(info.dtype, name)

    saved = {called: partial(whole, name) for called, name in forms.saved(task).items()}
    stated = config_of(forms.models[task], units, base, [*dict.fromkeys(map(owner_of, saved))])
    return adapter_of(name_of, infos, update, stated, saved)


def base_card(tasks: Sequence[str], forms: Forms, source: str) -> str:
    """Return the card of the base of tasks; `source` is the text of the configuration."""
    text = (
        f"The base of {len(tasks)} tasks, made of their fine-tunes by `decompose` of mergekit-ext. "
        "Each task is an adapter on it. Configuration, tokenizer"
        f"{' and head' if any(forms.private) else ''} are those of `{tasks[0]}`."
    )
    given, tags = {"library_name": "transformers"}, ["merge", "mergekit-ext"]
    load = loading(tasks[0], forms.kinds[0], forms)[1:-1]
    return page(FOLDER, tags, [text], load, source, given)


def section_of(adapters: Sequence[LoraAdapter], forms: Forms) -> str:
    """Return how to use a base and its adapters: in Python, and with a server if one takes them."""
    tasks = [adapter.name for adapter in adapters]
    parts = [
        "### Base and adapters",
        f"`{FOLDER}` is an ordinary model, and {', '.join(f'`{task}`' for task in tasks)} are PEFT "
        "LoRAs on it, with a scaling of 1. Load one with",
        "\n".join(["```python", *loading(tasks[0], forms.kinds[0], forms), "```"]),
    ]
    largest = max(info.configured_rank for each in adapters for info in each.infos.values())
    fits = [rank for rank in _VLLM_RANKS if rank >= largest]
    whole = bool(forms.biases) or any(adapter.saved for adapter in adapters)
    if all(kind.endswith("ForCausalLM") for kind in forms.kinds) and fits and not whole:
        options = f"--enable-lora --max-loras {len(tasks)} --max-lora-rank {fits[0]} --lora-modules"
        options = " ".join([options, *(f"{task}={task}" for task in tasks)])
        parts += ["or serve all with", f"```sh\nvllm serve {FOLDER} {options}\n```"]
    for note in dict.fromkeys(note for adapter in adapters for note in notes_of(adapter)):
        one = " `uniform_rank: true` writes one rank for all of an adapter." * (note == PATTERNS)
        parts.append(note + one)
    return "\n\n".join(parts)


def loading(task: str, kind: str, forms: Forms) -> list[str]:
    """Return Python that loads a task, a model of the class `kind`, from the folder above.

    Its head may have another shape.
    """
    private = any(forms.private)
    head = f'config=AutoConfig.from_pretrained("{task}"), ignore_mismatched_sizes=True'
    given = f'"{FOLDER}", {head}' if private else f'"{FOLDER}"'
    return [
        "from peft import PeftModel",
        f"from transformers import {'AutoConfig, ' if private else ''}{kind}",
        "",
        f"model = {kind}.from_pretrained({given})",
        f'model = PeftModel.from_pretrained(model, "{task}")',
    ]
