"""The algorithms of the FlexMerge paper, by the names that they have in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mergekit_ext.flexmerge.algorithms.base import Algorithm
from mergekit_ext.flexmerge.algorithms.linear import Average, ChannelMerging, TaskArithmetic
from mergekit_ext.flexmerge.algorithms.masking import Consensus, Emr
from mergekit_ext.flexmerge.algorithms.singular import TsvM
from mergekit_ext.flexmerge.algorithms.trimming import Pcb, Ties

ALGORITHMS: Mapping[str, type[Algorithm]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (Average, TaskArithmetic, Ties, Pcb, TsvM, Consensus, Emr, ChannelMerging)
    }
)
