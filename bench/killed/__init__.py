"""The parts of `bench.kills`."""
