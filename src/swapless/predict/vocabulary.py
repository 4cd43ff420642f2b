"""Tokens as numbers: the vocabulary of a training trace, and letter groups of texts that were never seen."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from swapless.predict.predictor import TokenKind
from swapless.trace import Trace

UNKNOWN = 0
"""Index of every token that is not in the vocabulary."""

MOST_GROUPS = 16


class Vocabulary:
    """Tokens of a training trace, most frequent first; index 0 is any other token.

    Parameters
    ----------
    kind : {"token", "token_id"}
        The column it was made of.
    words : sequence
        Texts or ids; ``words[i]`` has index i + 1.
    """

    def __init__(self, kind: TokenKind, words: Sequence[Any]) -> None:
        self.kind = kind
        self.words = list(words)
        self._index = {word: place for place, word in enumerate(self.words, start=1)}

    @classmethod
    def of(cls, trace: Trace, kind: TokenKind, *, most: int = 1 << 16) -> Vocabulary:
        """Vocabulary of the column ``kind``; equal counts stand in order of first appearance."""
        counts: dict[Any, int] = {}
        for word in column(trace, kind):
            counts[word] = counts.get(word, 0) + 1
        ordered = sorted(counts, key=lambda word: -counts[word])
        return cls(kind, ordered[:most])

    def __len__(self) -> int:
        """Number of indices, the unknown one included."""
        return len(self.words) + 1

    def encode(self, trace: Trace) -> np.ndarray:
        """Index of each token of ``trace``, int64 (T,)."""
        found = self._index.get
        return np.fromiter((found(word, UNKNOWN) for word in column(trace, self.kind)), np.int64, len(trace))

    def index(self, word: Any) -> int:
        """Index of one token."""
        return self._index.get(word, UNKNOWN)

    def arrays(self) -> dict[str, np.ndarray]:
        """The words as arrays that a file can hold."""
        if self.kind == "token_id":
            return {"vocabulary.ids": np.array(self.words, np.int64)}
        raw = [word.encode("utf-8", "surrogatepass") for word in self.words]
        ends = np.cumsum([len(part) for part in raw], dtype=np.int64) if raw else np.zeros(0, np.int64)
        return {"vocabulary.bytes": np.frombuffer(b"".join(raw), np.uint8).copy(), "vocabulary.ends": ends}

    @classmethod
    def restored(cls, kind: TokenKind, arrays: Any) -> Vocabulary:
        """Vocabulary from :meth:`arrays`."""
        if kind == "token_id":
            return cls(kind, arrays["vocabulary.ids"].tolist())
        whole, ends = arrays["vocabulary.bytes"].tobytes(), arrays["vocabulary.ends"].tolist()
        starts = [0, *ends[:-1]]
        return cls(kind, [whole[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends)])


def column(trace: Trace, kind: TokenKind) -> list[Any]:
    """Texts (a missing one is empty) or ids of the tokens."""
    if kind == "token_id":
        ids = trace.token_id
        return [] if ids is None else ids.tolist()
    return [word or "" for word in trace.tokens or []]


def letter_groups(words: Sequence[str], buckets: int) -> np.ndarray:
    """Buckets of the letter groups of each word, int64 (len(words), MOST_GROUPS), filled up with ``buckets``.

    Groups of 2 to 4 letters of the lower-case word between its ends, and its outer form (leading space, capitals, digits),
    so that a word never seen still resembles its relatives; after fastText (Bojanowski et al., 2017).
    """
    found = np.full((len(words), MOST_GROUPS), buckets, np.int64)
    for row, word in enumerate(words):
        bare = word.lstrip(" \u0120\u2581")
        form = ["#space" if bare != word else "#bound", "#" + _form(bare)]
        framed = f"<{bare.lower()}>"
        parts = [framed, *(framed[i : i + n] for n in (3, 4, 2) for i in range(len(framed) - n + 1))]
        chosen = dict.fromkeys([*form, *parts])
        codes = [zlib.crc32(part.encode("utf-8", "surrogatepass")) % buckets for part in chosen][:MOST_GROUPS]
        found[row, : len(codes)] = codes
    return found


def _form(bare: str) -> str:
    if not bare:
        return "empty"
    if bare.isdigit():
        return "digits"
    if bare.isalpha():
        return "title" if bare.istitle() else "upper" if bare.isupper() else "lower"
    return "mixed" if any(letter.isalnum() for letter in bare) else "marks"
