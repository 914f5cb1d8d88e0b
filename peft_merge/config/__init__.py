"""From YAML or arguments to a checked plan of a merge."""
