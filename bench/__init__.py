"""Measurements: scripts that print ratios and the machine. Not run by the tests."""
