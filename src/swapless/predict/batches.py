"""Documents of a trace as batches of tensors for the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from swapless.predict.features import Inputs, TokenMemory, join
from swapless.predict.vocabulary import MOST_GROUPS, column, letter_groups
from swapless.trace import Trace

if TYPE_CHECKING:
    import torch

Piece = tuple[int, int, int]
"""Document, first row in it, end."""


class Batch(NamedTuple):
    """N tokens: ``words`` (N,), ``groups`` (N, MOST_GROUPS), ``blocks`` (L, N, BLOCKS*E), ``scalars`` (N, SCALARS), ``chosen``
    (L, N, E) of 0 and 1, ``document`` (N,)."""

    words: torch.Tensor
    groups: torch.Tensor
    blocks: torch.Tensor
    scalars: torch.Tensor
    chosen: torch.Tensor
    document: torch.Tensor


class Documents:
    """Whole documents, each in one piece, seen through a memory.

    Parameters
    ----------
    trace : Trace
        The documents.
    memory : TokenMemory
        Vocabulary and counts.
    words : int
        Words that have a vector of their own; later ones of the vocabulary share that of the unknown.
    buckets : int
        Of letter groups.
    """

    def __init__(self, trace: Trace, memory: TokenMemory, *, words: int, buckets: int) -> None:
        self._ids, self._memory, self._words = trace.expert_ids, memory, words
        self._offsets = trace.document_offsets
        vocabulary = memory.vocabulary
        self._index = vocabulary.encode(trace)
        if vocabulary.kind == "token":
            texts, self._text = np.unique(np.array(column(trace, "token"), object), return_inverse=True)
            self._groups = letter_groups(list(texts), buckets)
        else:
            self._text = np.zeros(len(trace), np.int64)
            self._groups = np.full((1, MOST_GROUPS), buckets, np.int64)

    @property
    def count(self) -> int:
        """Number of documents."""
        return len(self._offsets) - 1

    def plan(self, which: Sequence[int], batch_tokens: int, rng: np.random.Generator | None) -> list[list[Piece]]:
        """Pieces of each batch: documents cut at ``batch_tokens``, in random order, or whole and in order without ``rng``."""
        pieces: list[Piece] = []
        for document in which:
            length = int(self._offsets[document + 1] - self._offsets[document])
            cut = length if rng is None else batch_tokens
            pieces += [(document, first, min(first + cut, length)) for first in range(0, length, cut)]
        if rng is not None:
            pieces = [pieces[place] for place in rng.permutation(len(pieces))]
        batches: list[list[Piece]] = [[]]
        room = batch_tokens
        for piece in pieces:
            size = piece[2] - piece[1]
            if batches[-1] and size > room:
                batches.append([])
                room = batch_tokens
            batches[-1].append(piece)
            room -= size
        return batches

    def inputs(self, pieces: Sequence[Piece], *, own: bool) -> tuple[Inputs, np.ndarray]:
        """Rows of some pieces, and letter groups (N, MOST_GROUPS) of their texts; ``own`` as :meth:`TokenMemory.inputs`."""
        parts, texts = [], []
        for number, (document, first, end) in enumerate(pieces):
            start = int(self._offsets[document])
            rows = slice(start, start + end)
            whole = self._memory.inputs(self._ids[rows], self._index[rows], own=own, number=number)
            parts.append(whole.rows(first))
            texts.append(self._text[start + first : start + end])
        return join(parts), self._groups[np.concatenate(texts)]

    def batch(
        self, pieces: Sequence[Piece], *, own: bool, unknown: float = 0.0, rng: np.random.Generator | None = None
    ) -> Batch:
        """Tensors of some pieces; ``unknown`` is the share of tokens shown as if they were not in the vocabulary."""
        inputs, groups = self.inputs(pieces, own=own)
        words = np.where(inputs.words < self._words, inputs.words, 0)
        if unknown and rng is not None:
            hidden = rng.random(len(words)) < unknown
            words[hidden] = 0
            inputs.blocks[:3, hidden] = 0
            inputs.scalars[hidden, :3] = 0
        return tensors(inputs, words, groups)


def tensors(inputs: Inputs, words: np.ndarray, groups: np.ndarray) -> Batch:
    """Numpy rows as the network takes them."""
    import torch

    blocks = torch.from_numpy(inputs.blocks)
    return Batch(
        torch.from_numpy(words),
        torch.from_numpy(groups),
        blocks.permute(2, 1, 0, 3).reshape(blocks.shape[2], blocks.shape[1], -1),
        torch.from_numpy(inputs.scalars),
        torch.from_numpy(inputs.chosen).permute(1, 0, 2).float().contiguous(),
        torch.from_numpy(inputs.document),
    )
