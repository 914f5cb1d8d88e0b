"""Classes beside decoders of text: speech, vision and language, embeddings."""
