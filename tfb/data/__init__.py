"""Rows: reading, checking, encoding and batching them."""
