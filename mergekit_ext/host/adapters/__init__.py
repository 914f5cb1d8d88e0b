"""``base+adapter`` inputs: the adapter is applied to each tensor when mergekit reads it.

mergekit by itself loads the whole base, merges the adapter with PEFT, writes the whole model into
``--lora-merge-cache`` and reads that. Here nothing is written and no model is loaded; the base is
opened once, however many adapters of it there are. ``MERGEKIT_EXT_ADAPTERS=0`` brings mergekit's
own way back, for adapters that can only be applied inside of a model.
"""
