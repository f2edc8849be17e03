"""Measurements against what people would do instead; see README.md in this folder."""
