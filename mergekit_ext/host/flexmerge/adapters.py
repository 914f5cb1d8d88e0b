"""A base model and a LoRA of each task, as PEFT reads them, of a plan with residuals.

The class of the models says what PEFT adapts exactly (`peft_merge.layers`); everything else of a
task is in its adapter if it is the whole of some modules, and else the base's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, listing
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.manifest import FACTORS, UNIFIED
from mergekit_ext.flexmerge.merging import require_in_range
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.residual import LOW_RANK, OWN, SHARED, Residual
from mergekit_ext.flexmerge.stored import FACTOR_ENDS, Place
from mergekit_ext.flexmerge.writer import DTYPES, Files, Piece
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.naming import Stored
from mergekit_ext.io.class_model import class_names
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.planned_files import split, weight_names
from peft_merge.adapter import LoraAdapter, ModuleInfo, Update
from peft_merge.io import load_adapter, names
from peft_merge.io.merged import WITHOUT_BIAS, lora_configuration
from peft_merge.io.parse import BIAS, factor_keys
from peft_merge.io.read import CONFIG, SAFETENSORS
from peft_merge.layers import Layer, layers_of

FOLDER = "base"  # of the base
_B, _A = FACTOR_ENDS
# By the end of a class's name; PEFT adds a head to `modules_to_save` for other tasks.
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM"}


@dataclass(frozen=True)
class Forms:
    """How adapters of a class hold tensors, by the names of these in files.

    Attributes:
        treatments: of all that the tasks could share.
        layers: what has a residual.
        biases: those of their modules that are a task's own; each is what `lora_B.bias` adds to.
        names: in the class, of what is in some adapter.
        private: for each task the same of what no other task has.
        private_bytes: of all these, and of those of the first task, which the base has.
        kind: the name of the class.
    """

    treatments: Mapping[str, str]
    layers: Mapping[str, Layer]
    biases: frozenset[str]
    names: Mapping[str, str]
    private: Sequence[Mapping[str, str]]
    private_bytes: int
    kind: str

    @property
    def held(self) -> set[str]:
        """What has a residual in every task: the layers with a bias, or else the smallest one."""
        return {*self.layers} if self.biases else {min(self.layers, key=self._numbers)}

    def _numbers(self, name: str) -> int:
        return self.layers[name].numbers

    def module(self, name: str) -> str:
        return _owner(self.names[name])

    def saved(self, task: int) -> list[str]:
        """Return the class's names of what a task's adapter holds whole."""
        own = [n for n, kept in self.treatments.items() if kept == OWN and n not in self.biases]
        return [*(self.names[name] for name in own), *self.private[task].values()]

    def stored(self, name: str) -> str:
        """Return the name of a whole tensor in the file of an adapter."""
        return names.PREFIX + names.stored(name, {self.module(layer) for layer in self.layers})


def forms_of(
    layout: Layout, models: Sequence[Stored], algorithm: Residual, findings: Findings
) -> Forms | None:
    """Return what adapters of these models hold; report what they cannot, and what that loses."""
    classes = [class_names(headers, config) for headers, config in models]
    first, model = classes[0], classes[0].model
    if any(each.model is None for each in classes):
        _problem(findings, "models whose class is not one of transformers", "those of its classes")
        return None
    # PEFT would change a tied tensor in one of its places only.
    without = first.converted.union(*model.all_tied_weights_keys.items())
    parts = [(block, part) for block in layout.blocks for part in block.parts]
    wanted = {part.name: algorithm.treatment(block, part) for block, part in parts}
    found = layers_of(model)
    adapted = {n for n, kept in wanted.items() if kept == LOW_RANK and first.of[n] in found}
    layers = {name: found[first.of[name]] for name in adapted if first.of[name] not in without}
    layers = {name: each for name, each in layers.items() if each.info.layout != "parameter"}
    if not layers:
        _problem(findings, "models without a matrix that PEFT adapts", "one at least")
        return None
    biases = _biases(layers, wanted, first.of)
    own = {n for n, kept in wanted.items() if kept == OWN and first.of[n] not in without} - biases
    private: list[dict[str, str]] = []
    for task, each, headers in zip(layout.tasks, classes, layout.private, strict=True):
        has = each.model.state_dict()
        named = {h.name: each.of[h.name] for h in headers if each.of[h.name] in has}
        whole = _whole(each.model, {*map(first.of.__getitem__, own), *named.values()})
        own = {name for name in own if _owner(first.of[name]) in whole}
        private.append({n: called for n, called in named.items() if _owner(called) in whole})
        alone = [h.name for h in headers if h.floating and h.name in named.keys() - private[-1]]
        if alone:
            what = f"{listing(alone)} of {task}, which only a whole module could replace"
            _problem(findings, what, "private tensors that are all of their modules")
            return None
    treatments = {
        **dict.fromkeys(wanted, SHARED),
        **dict.fromkeys(own | biases, OWN),
        **dict.fromkeys(layers, LOW_RANK),
    }
    _warn_of_losses(layout, wanted, treatments, layers, findings)
    sizes = [h.nbytes for h in layout.private[0]]  # in the base
    for names_of, headers in zip(private, layout.private, strict=True):
        sizes += [header.nbytes for header in headers if header.name in names_of]
    kind = type(model).__name__
    return Forms(treatments, layers, frozenset(biases), first.of, private, sum(sizes), kind)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _biases(
    layers: Mapping[str, Layer], wanted: Mapping[str, str], called: Mapping[str, str]
) -> set[str]:
    """Return the biases of all layers, if PEFT has a place for those of all and all are own."""
    stored = {called[name]: name for name in wanted}
    biases = {stored.get(f"{_owner(called[name])}.bias", "") for name in layers}
    can = all(layer.bias and layer.info.layout not in WITHOUT_BIAS for layer in layers.values())
    return biases if can and all(wanted.get(name) == OWN for name in biases) else set()


def _problem(findings: Findings, found: str, expected: str) -> None:
    remedy = "Write `output: checkpoint`, which holds everything."
    findings.problem("parameters.output", f"`adapters` of {found}", expected, remedy)


def _whole(model: Any, tensors: set[str]) -> set[str]:
    """Return the modules that `tensors` are all of, and whose names end those of no others.

    PEFT saves every module whose name ends with an entry of `modules_to_save`.
    """
    modules = dict(model.named_modules())
    owners = {*map(_owner, tensors)} - {""}
    found = {
        owner
        for owner in owners & modules.keys()
        if all(f"{owner}.{name}" in tensors for name in modules[owner].state_dict())
    }
    while more := {o for o in found if any(m.endswith(o) for m in modules.keys() - found)}:
        found -= more
    return found


def _warn_of_losses(
    layout: Layout,
    wanted: Mapping[str, str],
    treatments: Mapping[str, str],
    layers: Mapping[str, Layer],
    findings: Findings,
) -> None:
    lost = [name for name, kept in treatments.items() if kept != wanted[name]]
    if not lost:
        return
    sizes = {p.name: p.slice.stop - p.slice.start for b in layout.blocks for p in b.parts}
    share = sum(map(sizes.__getitem__, lost)) / sum(sizes.values())
    embedded = any(layer.info.layout in WITHOUT_BIAS for layer in layers.values())
    biased = any(name.endswith("bias") for name in lost) and embedded
    hint = " Biases of adapted layers have one with `embeddings: shared` or `own`." * biased
    findings.warn(
        f"No LoRA can hold {len(lost)} of {len(sizes)} tensors ({share:.2%} of the parameters), of "
        f"which every task has the base's: {listing(lost)}. `output: checkpoint` keeps them.{hint}"
    )


def adapted_pieces(pieces: Iterable[Piece], forms: Forms, layout: Layout) -> list[Piece]:
    """Return the pieces of a plan under the names and in the shapes of the base and of adapters."""
    blocks = len(layout.blocks)
    return [
        found
        for index, piece in enumerate(pieces)
        if (found := _adapted(piece, forms) if index < blocks else _private(piece, forms)).entries
    ]


def _adapted(piece: Piece, forms: Forms) -> Piece:
    headers = [header for _, header in piece.entries]
    shapes = (torch.empty(h.shape, dtype=DTYPES[h.dtype], device="meta") for h in headers)
    entries = [
        (place, TensorHeader.of(name, tensor.dtype, tensor.shape))
        for place, name, tensor in _converted(piece, forms, shapes)
    ]
    tensors = (tensor for _, _, tensor in piece.tensors)
    return replace(piece, entries=entries, tensors=_converted(piece, forms, tensors))


def _converted(
    piece: Piece, forms: Forms, tensors: Iterable[Tensor]
) -> Iterator[tuple[Place, str, Tensor]]:
    base = b = torch.empty(0)  # what comes before a task's own, and before A
    for (place, header), tensor in zip(piece.entries, tensors, strict=True):
        name = header.name
        if place.kind == FACTORS and name.endswith(_B):
            b = tensor
        elif place.kind == FACTORS:
            name, rank = name.removesuffix(_A), header.shape[0]
            for key, factor in zip(*_stored(forms.layers[name], b, tensor, rank), strict=True):
                yield place, f"{names.PREFIX}{forms.module(name)}.{key}", factor
        elif place.kind == UNIFIED:
            base = tensor
            yield place, name, tensor
        else:
            own, home = (
                tensor.view(DTYPES[header.dtype]).view(header.shape),
                Place(FACTORS, place.tasks),
            )
            if name not in forms.biases:
                yield home, forms.stored(forms.names[name]), own
                continue
            wide = torch.promote_types(torch.float32, base.dtype)
            change = (own.to(wide) - base.to(wide)).to(base.dtype)
            if not change.is_meta:
                require_in_range(change, name)
            yield home, f"{names.PREFIX}{forms.module(name)}.{BIAS}", change


def _stored(
    layer: Layer, b: Tensor, a: Tensor, rank: int
) -> tuple[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return the names and tensors of B A, filled with zeros up to a rank, as PEFT stores them."""
    if layer.transposed:
        b, a = a.mT, b.mT
    update = Update(a[None], b[None], 1.0).filled(rank)
    return factor_keys(layer.info.layout), layer.info.store(update.a, update.b)


def _private(piece: Piece, forms: Forms) -> Piece:
    """Return what one task alone has, for its adapter; the base has that of the first task."""
    ((place, header),) = piece.entries
    (task,) = place.tasks
    entries: list[tuple[Place, TensorHeader]] = []
    if task == 0:
        entries.append((Place(UNIFIED, tuple(range(len(forms.private)))), header))
    if (own := forms.private[task].get(header.name)) is not None:
        entries.append((Place(FACTORS, (task,)), replace(header, name=forms.stored(own))))

    def copied() -> Iterator[tuple[Place, str, Tensor]]:
        for _, _, tensor in piece.tensors:
            for home, entry in entries:
                yield home, entry.name, tensor

    return replace(piece, entries=entries, tensors=copied())


def filed(
    entries: Mapping[Place, Sequence[TensorHeader]], tasks: Sequence[str], limit: int
) -> Files:
    """Return the files of the base, of at most `limit` bytes (0: one), and those of adapters."""
    files: Files = {}
    for place, own in entries.items():
        if place.kind == FACTORS:
            (task,) = place.tasks
            files[f"{tasks[task]}/{SAFETENSORS}"] = place, own
            continue
        shards = split(own, limit)
        for name, shard in zip(weight_names(len(shards)), shards, strict=True):
            files[f"{FOLDER}/{name}"] = place, shard
    return files


def modules_of(
    plan: Plan, forms: Forms, layout: Layout, task: int, forced: torch.dtype | None
) -> dict[str, ModuleInfo]:
    """Return the modules that a task's adapter changes."""
    everyone = range(len(layout.tasks))
    dtypes = {p.name: forced or p.dtype(everyone) for b in layout.blocks for p in b.parts}
    ranks = {n: r for (group,) in plan.groups for n, r in group.ranks[task].items()}
    bias = bool(forms.biases)
    return {
        forms.module(name): replace(
            forms.layers[name].info, rank=rank, bias=bias, dtype=dtypes[name]
        )
        for name, rank in ranks.items()
    }


def write_configuration(
    folder: Path, infos: Mapping[str, ModuleInfo], forms: Forms, task: int, base: str
) -> None:
    """Write a task's adapter_config.json beside its tensors, and read both again.

    Raises:
        MergeError: the configuration does not describe the tensors.
    """
    saved = forms.saved(task)
    kinds = (kind for end, kind in _TASK_TYPES.items() if forms.kind.endswith(end))
    entries = list(dict.fromkeys(map(_owner, saved)))
    stated = {
        "base_model_name_or_path": base,
        "modules_to_save": entries or None,
        "task_type": next(kinds, None),
    }
    whole = dict.fromkeys(saved, lambda: torch.empty(0))
    updates: dict[str, Update] = {}
    given = LoraAdapter(folder.name, stated, {}, updates.__getitem__, whole)
    config = lora_configuration(infos, [given], saved)
    config["fan_in_fan_out"] = any(
        layer.transposed and layer.info.layout == "linear" for layer in forms.layers.values()
    )
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    again = load_adapter(folder, name=folder.name)
    if again.infos != infos or {*again.saved} != {*saved}:
        wrong = [m for m in {*infos, *again.infos} if infos.get(m) != again.infos.get(m)]
        wrong += sorted({*again.saved} ^ {*saved})
        raise MergeError(f"{os.fspath(folder)}: {listing(wrong)} read differently from the plan.")
