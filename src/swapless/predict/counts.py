"""What each token, and each pair of neighbours, was routed to in training: counts, and the prior made of them.

With ``own`` counts of a training document left out of its own prior, the prior that a model is trained on is as good as the
one it will meet later, and no better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from swapless.arrays import want
from swapless.predict._kernels import add_routing

PAIR = np.int64(1 << 32)


class CountTable:
    """Rows of counts by key.

    Parameters
    ----------
    keys : int64 ndarray of shape (R,)
        Ascending.
    totals : int64 ndarray of shape (R,)
        Occurrences of each key.
    counts : uint16 ndarray of shape (R, L*E)
        How many of them were routed to each expert.

    Raises
    ------
    UsageError
        Arrays of other types, or that do not fit each other.
    """

    def __init__(self, keys: np.ndarray, totals: np.ndarray, counts: np.ndarray) -> None:
        self.keys = want(keys, "keys of a table", np.int64, (None,))
        self.totals = want(totals, "totals of a table", np.int64, (len(keys),))
        self.counts = want(counts, "counts of a table", np.uint16, (len(keys), None))

    @classmethod
    def of(cls, keys: np.ndarray, ids: np.ndarray, num_experts: int, *, least: int = 1, most: int = 1 << 20) -> CountTable:
        """Counts of ``ids`` (T, L, K) by ``keys`` (T,); only keys seen ``least`` times, at most the ``most`` frequent."""
        known, totals = np.unique(keys[keys >= 0], return_counts=True)
        order = np.argsort(-totals, kind="stable")[:most]
        kept = np.sort(order[totals[order] >= least])
        known, totals = known[kept], totals[kept]
        counts = np.zeros((len(known), ids.shape[1] * num_experts), np.uint16)
        table = cls(known, totals.astype(np.int64), counts)
        add_routing(counts, table.find(keys), ids, num_experts)
        return table

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, -1 where it is unknown; int64 (T,)."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, place, -1)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Occurrences (T,) and counts (T, L*E), float32, of table rows; zeros for row -1."""
        if not len(self.keys):
            return np.zeros(len(rows), np.float32), np.zeros((len(rows), self.counts.shape[1]), np.float32)
        known = rows >= 0
        totals = np.where(known, self.totals[rows], 0).astype(np.float32)
        counts = self.counts[rows].astype(np.float32)
        counts[~known] = 0
        return totals, counts

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The table as arrays of a file: which counts are above 0, one bit each, and those counts, row after row."""
        some = self.counts > 0
        return {
            f"{name}.keys": self.keys,
            f"{name}.totals": self.totals,
            f"{name}.some": np.packbits(some, axis=1),
            f"{name}.counts": _narrow(self.counts[some]),
        }

    @classmethod
    def restored(cls, name: str, arrays: Mapping[str, Any], width: int) -> CountTable:
        """Table from :meth:`arrays`; ``width`` is L*E."""
        keys = arrays[f"{name}.keys"]
        counts = np.zeros((len(keys), width), np.uint16)
        counts[np.unpackbits(arrays[f"{name}.some"], axis=1, count=width).astype(bool)] = arrays[f"{name}.counts"]
        return cls(keys, arrays[f"{name}.totals"], counts)


def _narrow(counts: np.ndarray) -> np.ndarray:
    return counts.astype(np.uint8) if not len(counts) or counts.max() < 256 else counts


def pairs(words: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Key of each token with the one before it in its document, int64 (T,); -1 at the start or with an unknown word."""
    before = np.concatenate([[0], words[:-1]])
    first = np.concatenate([[True], document[1:] != document[:-1]])
    return np.where(first | (before <= 0) | (words <= 0), -1, before * PAIR + words)
