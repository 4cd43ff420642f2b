"""Text as it is generated: whole characters, in order, and nothing of a stop string."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["TextStream"]

_CONTEXT_TOKENS = 6
"""Tokens of the prompt decoded along with the first new ones: a word's leading space depends on what stands before it."""


class TextStream:
    """A streamer for ``model.generate`` that hands finished text to ``write`` at once.

    It holds back bytes of an unfinished character and any tail that may still become a stop string. ``put`` and ``end`` are
    what transformers calls; the first ``put`` brings the prompt.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Turns ids into text.
    write : callable of str
        Receives each piece, never empty.
    stop : sequence of str
        The text ends before the first of these; :attr:`stopped` then says so.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.text = ""
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._tokenizer = tokenizer
        self._write = write
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._prompt_tokens: int | None = None
        self._from = 0
        self._done = 0
        self._held = ""

    @property
    def new_ids(self) -> list[int]:
        """Ids generated so far, special ones included."""
        return self._ids[self._prompt_tokens or 0 :]

    def put(self, value: Any) -> None:
        """Take the prompt's ids, then one token a call; writes what is finished."""
        ids = value.reshape(-1).tolist()
        self._ids += ids
        if self._prompt_tokens is None:
            self._prompt_tokens = self._done = len(ids)
            self._from = max(0, len(ids) - _CONTEXT_TOKENS)
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self._decode(whole=False)

    def end(self) -> None:
        """Write what was held back: the generation is over."""
        self._decode(whole=True)
        if not self.stopped:
            self._emit(self._held)
            self._held = ""

    def _decode(self, *, whole: bool) -> None:
        known, text = (self._text(ids) for ids in (self._ids[self._from : self._done], self._ids[self._from :]))
        if len(text) > len(known) and (whole or not text.endswith("\ufffd")):
            self._from, self._done = self._done, len(self._ids)
            self._take(text[len(known) :])

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _take(self, piece: str) -> None:
        if self.stopped:
            return
        self._held += piece
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            self._emit(self._held[: min(found)])
            self._held = ""
            return
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        self._emit(ready)

    def _emit(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._write(piece)


def _overlap(text: str, stop: str) -> int:
    """Longest end of ``text`` that begins ``stop``, in characters."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
