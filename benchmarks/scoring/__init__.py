"""Whole jobs of ``tfb score``."""
