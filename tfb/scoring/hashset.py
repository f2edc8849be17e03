"""A set of 64-bit hashes for millions of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class HashSet:
    """A growing set of 64-bit hashes in sorted arrays, 8 bytes each."""

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._runs: list[np.ndarray] = []
        self.add(hashes)

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def contains(self, hashes: Sequence[int]) -> list[bool]:
        """For each hash whether it is in the set."""
        return [bool(x) for x in self._found(np.array(hashes, dtype=np.uint64))]

    def add(self, hashes: Iterable[int]) -> None:
        """Add hashes; those that are there already count once."""
        run = np.unique(np.fromiter(hashes, dtype=np.uint64))
        run = run[~self._found(run)]
        if len(run):
            self._runs.append(run)
        # Runs at least halve in length from one to the next: few to search, rarely merged.
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.union1d(self._runs[-1], last)

    def _found(self, wanted: np.ndarray) -> np.ndarray:
        found = np.zeros(len(wanted), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            found |= run[at] == wanted
        return found
