"""``base+adapter`` inputs: the adapter is applied to each tensor when mergekit reads it.

mergekit by itself loads the base, merges with PEFT, and writes and reads a whole model.
"""
