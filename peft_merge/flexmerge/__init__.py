"""FlexMerge over adapters: m adapters that share what they can, in the space of fewer."""
