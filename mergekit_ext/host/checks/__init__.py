"""Checks before a merge: everything that is wrong, in one list, before any weight is read."""
