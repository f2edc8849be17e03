"""Calibration metrics, paired comparisons and the report."""
