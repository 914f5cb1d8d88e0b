"""From parameter names to blocks: the parts of a model that are treated as one.

Names go in and names come out: no tensor, no configuration, no code of the model is needed, so
the same rule serves every architecture that follows the naming habits of transformers. What those
habits are is written in `tables`; a new one is a line there. The rule, for users: docs/blocks.md.
"""
