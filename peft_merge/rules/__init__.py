"""Merge rules: from m changes of one weight to one. Each file registers some."""
