"""Predictions for many rows, streaming or from files to files."""
