"""The data and models of ``tfb demo``."""
