"""`peft_merge.methods`: the methods of adapters, from their declarations."""

from dataclasses import replace
from typing import Any

from mergekit_ext.declared import ADAPTERS
from mergekit_ext.declared import methods as declared
from mergekit_ext.declared.catalogue import described, with_family
from mergekit_ext.flexmerge.plan import PAPER, TITLE, USE
from peft_merge.flexmerge.method import NAME, OWN
from peft_merge.modules import rules


def methods(name: str | None = None) -> Any:
    """Return what is known of a merge method for adapters, or of all.

    Arguments, result and errors are those of `mergekit_ext.methods`.

    Example:
        >>> print(peft_merge.methods())
        >>> peft_merge.methods("ties").yaml
    """
    plain = declared(ADAPTERS)
    flexmerge = replace(plain["linear"], name=NAME, title=TITLE, paper=PAPER, use=USE)
    flexmerge = replace(flexmerge, parameters=OWN, example={"target_size": 2.25})
    found = described([*plain.values(), flexmerge], ADAPTERS)
    with_family(found, rules().keys() - plain.keys())
    return found.named(name)
