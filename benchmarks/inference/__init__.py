"""Whole models: prediction, and what draws cost in passes."""
