"""What the fitted predictors look at before a token starts: priors of its text and fading sums of past routing.

One block of E values a MoE layer each: the token's own prior, what its pair with the token before adds to that, what the
same text met earlier in the document adds, the choices of the token before, and fading sums of all before. Priors are logs of
smoothed counts, each relative to the one it falls back to, so that an unseen text gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swapless.arrays import want
from swapless.predict._kernels import add_routing, document_blocks, logs, multi_hot
from swapless.predict.counts import CountTable, pairs
from swapless.predict.popularity import popularity
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace

FADES = np.array([0.6, 0.85, 0.96], np.float32)
BLOCKS = 4 + len(FADES)
SCALARS = 5


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows of tokens as a model takes them.

    ``words`` int64 (n,); ``blocks`` float32 (BLOCKS, n, L, E); ``scalars`` float32 (n, SCALARS); ``chosen`` uint8 (n, L, E) the
    routing of the rows themselves; ``document`` int64 (n,) which text, as the caller numbers it.
    """

    words: np.ndarray
    blocks: np.ndarray
    scalars: np.ndarray
    chosen: np.ndarray
    document: np.ndarray

    def rows(self, first: int) -> Inputs:
        """The rows from ``first`` on."""
        if not first:
            return self
        later = slice(first, None)
        return Inputs(self.words[later], self.blocks[:, later], self.scalars[later], self.chosen[later], self.document[later])


class TokenMemory:
    """Counts of the training trace, and the inputs made of them.

    Parameters
    ----------
    vocabulary : Vocabulary
        Texts or ids.
    popularity : float32 ndarray of shape (L, E)
        Share of the training tokens that chose each expert.
    single, pair : CountTable
        By word, and by pair of neighbours.
    """

    def __init__(self, vocabulary: Vocabulary, popularity: np.ndarray, single: CountTable, pair: CountTable) -> None:
        self.vocabulary = vocabulary
        self.popularity = want(popularity, "popularity", np.float32, (None, None))
        self.single, self.pair = single, pair
        for table in (single, pair):
            want(table.counts, "counts of a table", np.uint16, (None, popularity.size))

    @classmethod
    def of(cls, trace: Trace, vocabulary: Vocabulary, *, most_pairs: int = 8192) -> TokenMemory:
        """Memory of whole documents, each in one piece."""
        words, ids, experts = vocabulary.encode(trace), trace.expert_ids, trace.num_experts
        single = CountTable.of(words, ids, experts, most=1 << 14)
        pair = CountTable.of(pairs(words, trace.document), ids, experts, least=2, most=most_pairs)
        return cls(vocabulary, popularity(trace), single, pair)

    def inputs(self, ids: np.ndarray, words: np.ndarray, *, own: bool = False, number: int = 0) -> Inputs:
        """Rows of one document.

        Parameters
        ----------
        ids : int16 ndarray of shape (T, L, K)
            Routing; row t is used for rows after t only, and for ``chosen``.
        words : int64 ndarray of shape (T,)
            Indices in the vocabulary.
        own : bool
            The document is part of the training trace: leave its own counts out.
        number : int
            Goes to ``document``.
        """
        layers, experts = self.popularity.shape
        rows = len(words)
        blocks = np.empty((BLOCKS, rows, layers * experts), np.float32)
        numbers = np.empty((3, rows), np.float32)
        distinct, inverse = np.unique(words, return_inverse=True)
        inverse[words <= 0] = -1  # different unknown texts share one index, so they tell nothing about each other
        keys = pairs(words, np.zeros(rows, np.int64))
        tables: list[Any] = []
        for table, key in ((self.single, words), (self.pair, keys)):
            tables.append((table.find(key), table.totals, table.counts))
        for table, key in ((self.single, words), (self.pair, keys)):
            tables.append(_own(key, ids, experts) if own else (np.full(rows, -1, np.int64), table.totals, table.counts))
        single, pair, own_single, own_pair = tables
        document_blocks(
            ids, experts, FADES, self.smooth, inverse, len(distinct), single, pair, own_single, own_pair, blocks, numbers
        )
        chosen = np.zeros((rows, layers, experts), np.uint8)
        multi_hot(ids, experts, chosen)
        blocks = blocks.reshape(BLOCKS, rows, layers, experts)
        return Inputs(words, blocks, scalars(numbers, np.arange(rows)), chosen, np.full(rows, number, np.int64))

    @property
    def smooth(self) -> np.ndarray:
        """Popularity, never 0, flat: (L*E,)."""
        return self.popularity.reshape(-1) + np.float32(1e-3)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays of a file."""
        return {
            **self.vocabulary.arrays(),
            "popularity": self.popularity,
            **self.single.arrays("single"),
            **self.pair.arrays("pair"),
        }

    @classmethod
    def restored(cls, kind: Any, arrays: Mapping[str, np.ndarray]) -> TokenMemory:
        """Memory from :meth:`arrays`."""
        share = arrays["popularity"]
        tables = (CountTable.restored(name, arrays, share.size) for name in ("single", "pair"))
        return cls(Vocabulary.restored(kind, arrays), share, *tables)


def scalars(numbers: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Float32 (n, SCALARS): how often word, pair and word in this document were met, (3, n), and the place in the document."""
    columns = np.concatenate([1.0 + numbers, 1.0 + place[None]])
    found = np.empty(columns.shape)
    logs(columns, found)
    return (np.stack([*found, place == 0], 1) * 0.5).astype(np.float32)


def _own(keys: np.ndarray, ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The document's own counts by key, as :func:`document_blocks` takes a table."""
    distinct, rows, totals = np.unique(keys, return_inverse=True, return_counts=True)
    counts = np.zeros((len(distinct), ids.shape[1] * num_experts), np.uint16)
    add_routing(counts, rows, ids, num_experts)
    return rows, totals, counts


def join(parts: list[Inputs]) -> Inputs:
    """Rows of several documents, one after the other."""
    return Inputs(
        np.concatenate([part.words for part in parts]),
        np.concatenate([part.blocks for part in parts], axis=1),
        np.concatenate([part.scalars for part in parts]),
        np.concatenate([part.chosen for part in parts]),
        np.concatenate([part.document for part in parts]),
    )
