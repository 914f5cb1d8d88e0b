"""`merge_method: flexmerge`: from mergekit's configuration to the FlexMerge engine."""
