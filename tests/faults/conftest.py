"""What all faults befall: a small job, its model, and the parts that it makes undisturbed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.children import Children, children
from support.scoring import artifact, cluster, job, loaded, whole

__all__ = ["artifact", "cluster", "in_child", "job", "loaded", "whole"]


@pytest.fixture(scope="session")
def in_child() -> Iterator[Children]:
    """Calls functions in processes of their own."""
    with children() as found:
        yield found
