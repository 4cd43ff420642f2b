"""What a trace is, in counts: one pass over the rows, for a trace in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swapless.notation import NO_EXPERT, Phase
from swapless.trace.capacity import PIECE_DOCUMENTS, PIECE_TOKENS, Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Summary:
    """Counts of a trace.

    Parameters
    ----------
    lengths : int64 ndarray of shape (D,)
        Tokens of each document.
    phase_tokens : dict of str to int
        Tokens of each phase that occurs.
    domains : tuple of str
        Labels that occur, sorted.
    unused_places : int
        Places for expert ids that hold none.
    """

    lengths: np.ndarray
    phase_tokens: dict[str, int]
    domains: tuple[str, ...]
    unused_places: int

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return int(self.lengths.sum())


def summarize(source: Source, columns: Sequence[str] = ()) -> Summary:
    """Counts of ``source``; where it is a file, it is validated by the way, these optional columns included."""
    lengths: list[np.ndarray] = []
    phases = np.zeros(len(Phase), np.int64)
    domains: set[str] = set()
    unused = 0
    for piece in source.pieces(PIECE_TOKENS, PIECE_DOCUMENTS, columns=columns):
        lengths.append(np.diff(piece.document_offsets))
        phases += np.bincount(piece.phase, minlength=len(Phase))
        domains.update(piece.domains[code] for code in np.unique(piece.domain) if code >= 0)
        unused += int((piece.expert_ids == NO_EXPERT).sum())
    counts = {phase.label: int(phases[phase]) for phase in Phase if phases[phase]}
    return Summary(lengths=np.concatenate(lengths), phase_tokens=counts, domains=tuple(sorted(domains)), unused_places=unused)
