"""The report file, the sections of cards, tables and plots of a finished merge."""
