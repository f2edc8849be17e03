"""A small job on digits, as the faults have it."""

from support.scoring import artifact, cluster, job, loaded, whole

__all__ = ["artifact", "cluster", "job", "loaded", "whole"]
