"""Merging the last checkpoints of a run while it trains, and what that gives."""
