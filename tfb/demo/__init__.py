"""``tfb demo`` and its data."""
