"""The exact algebra of low-rank changes: core space, dense changes, choice of a rank."""
