"""Classes beside decoders of text: so far vision and language."""
