"""Adapters made by hand, for tests of the algebra."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mergekit_ext.core.parameters import AUTO, WEIGHT
from mergekit_ext.declared import ADAPTERS, Call
from peft_merge.adapter import LoraAdapter, ModuleInfo, Update
from peft_merge.modules import merge_modules


def update(seed, rank, shape=(1, 24, 18), *, scale=0.5, dtype=torch.float32, size=1.0, bias=False):
    """Random factors; about as large as trained ones when `size` is 1."""
    n, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)

    def drawn(*of):
        return (size * torch.randn(of, generator=generator, dtype=torch.float64)).to(dtype)

    return Update(
        drawn(n, rank, columns), drawn(n, rows, rank), scale, drawn(rows) if bias else None
    )


def adapter(name, updates):
    """An adapter of these modules."""
    infos = {
        module: ModuleInfo(
            layout="linear" if len(u.a) == 1 else "parameter",
            matrices=len(u.a),
            rows=u.b.shape[1],
            columns=u.a.shape[2],
            rank=u.a.shape[1],
            bias=u.bias is not None,
            dtype=u.a.dtype,
        )
        for module, u in updates.items()
    }
    return LoraAdapter(name, {}, infos, updates.__getitem__)


def defaults(rule, count):
    """All defaults of a rule, but the factor of its paper, weights 1, for so many adapters."""
    parameters = rule.for_driver(ADAPTERS)
    published = {"lambda": 1.0, "scale": "paper"}
    shared = {
        p.name: published[p.name] if p.default == AUTO else p.default
        for p in parameters
        if not p.per_model
    }
    own = {p.name: p.default for p in parameters if p.per_model and p is not WEIGHT}
    return Call([1.0] * count, shared, [own] * count)


def settings(rule, count, *, weights=None, each=None, **options):
    """Defaults of a rule with some values changed."""
    found = defaults(rule, count)
    names = {name.rstrip("_"): value for name, value in options.items()}
    assert names.keys() <= found.options.keys(), names
    return Call(
        weights or found.weights,
        {**found.options, **names},
        [{**found.each[i], **(each[i] if each else {})} for i in range(count)],
    )


def merge(adapters, rule, resolve, *, space="delta", **options):
    """The merged values, what they are, and the report, each by module."""
    plan = SimpleNamespace(
        **{"rank": None, "dtype": None, "device": "cpu", "seed": 0, **options},
        adapters=adapters,
        space=space,
    )
    pieces = dict(merge_modules(plan, rule, resolve))
    return (
        {module: piece.value for module, piece in pieces.items()},
        {module: piece.info for module, piece in pieces.items()},
        {module: piece.details for module, piece in pieces.items()},
    )


def always(values):
    """The same settings for every module."""
    return lambda module: values
