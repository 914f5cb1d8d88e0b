"""Checks before a merge: everything that is wrong, in one list, before any weight is read."""

from mergekit_ext.host.checks.flat import check_flat
from mergekit_ext.host.checks.keys import unknown_keys
from mergekit_ext.host.checks.merge import check_merge, examine, models_of_stock
from mergekit_ext.host.checks.report import CheckReport, Estimate
from mergekit_ext.host.checks.source import check_source

__all__ = [
    "CheckReport",
    "Estimate",
    "check_flat",
    "check_merge",
    "check_source",
    "examine",
    "models_of_stock",
    "unknown_keys",
]
