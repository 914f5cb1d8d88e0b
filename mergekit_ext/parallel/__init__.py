"""Several processes that make one output: which of them does what, and how they start."""
