"""`mergekit_ext.methods`: the methods of mergekit's YAML, from their declarations."""

from dataclasses import replace
from typing import Any

import yaml
from mergekit.merge_methods.base import ParameterScope

import mergekit_ext
from mergekit_ext.core.parameters import REQUIRED, Parameter
from mergekit_ext.declared import ADAPTERS, BLOCKS, MODELS
from mergekit_ext.declared import methods as declared
from mergekit_ext.declared.catalogue import Description, described, with_family
from mergekit_ext.flexmerge.residual import PARAMETERS, Residual
from mergekit_ext.host.flexmerge import DECOMPOSITION, FLEXMERGE
from mergekit_ext.host.flexmerge.parameters import AS_ADAPTERS, BASE, OWN
from mergekit_ext.host.method import registered
from mergekit_ext.host.nan_method import PARAMETERS as OF_NAN
from mergekit_ext.host.nan_method import NanMethod


def methods(name: str | None = None) -> Any:
    """Return what is known of a merge method, or of all that the package adds to mergekit.

    Args:
        name: as in YAML; of an algorithm of FlexMerge ``"flexmerge:ties"``; None for all.

    Returns:
        A `Description`: `name`, `title`, `paper`, `use` (when to use it), `parameters` and `yaml`,
        a merge that runs; as text, a page. Of all methods a mapping from names to these; as text, a
        line for each. mergekit's own methods are not in it, but have a page by name.

    Raises:
        ConfigError: there is no method of this name.

    Example:
        >>> print(mergekit_ext.methods())
        >>> mergekit_ext.methods("lore").yaml
    """
    mergekit_ext.register()
    nan = replace(declared(ADAPTERS)["nan"], parameters=OF_NAN)
    wrapped = [name for name, one in registered().items() if isinstance(one, NanMethod)]
    flexmerge = replace(FLEXMERGE, parameters=OWN, example={"target_size": 2.25})
    own, defaults = (BASE, *PARAMETERS), {**AS_ADAPTERS, "target_size": None}
    residual = replace(DECOMPOSITION, name=Residual.name, use=Residual.use, parameters=own)
    shared = [p for p in OWN if p.name in ("target_size", "granularity", "heads", "task")]
    changed = (replace(p, default=defaults.get(p.name, p.default)) for p in (*shared, *own))
    decompose = replace(DECOMPOSITION, parameters=tuple(changed), example={"target_size": 1.5})
    found = described([nan, *declared(MODELS).values(), flexmerge, decompose], MODELS)
    with_family(found, [name for name in wrapped if name != "nan"])
    found |= described([*declared(BLOCKS).values(), residual], BLOCKS, flexmerge.name)
    found.others = {n: _other(one) for n, one in registered().items() if n not in found}
    return found.named(name)


def _other(method: Any) -> Description:
    """Return what mergekit's registry says of a method that is not declared here."""
    spec, own = method.spec, list[Parameter]()
    for p in spec.parameters:
        default, each = REQUIRED if p.required else p.default, p.scope != ParameterScope.SHARED
        own.append(Parameter(p.name, p.value_type, default, p.description or "", each))
    given = {p.name: 1.0 if p.name == "weight" else 0.5 for p in own if p.required}
    text = yaml.safe_dump({"merge_method": spec.name, "parameters": given}, sort_keys=False)
    use = f"Of the package {type(method).__module__.split('.')[0]}, which documents it."
    return Description(spec.name, spec.pretty_name or "", spec.reference_url, use, tuple(own), text)
