"""What is told about a finished merge: the report file and the model card."""
