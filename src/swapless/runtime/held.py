"""What a KV cache holds, as rows of the recording; follows the cache through everything that transformers does with one.

It is kept on the cache itself, so that a copy of the cache has a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import numpy as np

from swapless.runtime.texts import NO_ROW, UNKNOWN_ROW, Texts

_ATTRIBUTE = "_swapless_held"


class Held:
    """The rows in a cache of B sequences, in the order of its places.

    Parameters
    ----------
    texts : Texts
        Where texts begin and end.
    batch : int
        B.

    Attributes
    ----------
    length : int
        Places taken.
    settled : int
        Of these, the first so many are text for sure; the others are drafts that nobody has accepted yet.
    stream : int32 ndarray of shape (B,)
        A name for each sequence.
    in_generation : bool
        Whether ``generate`` is at work on it, or it belongs to an assistant: what is taken back then was a draft.
    reordered : bool
        Whether beams were exchanged since the last :meth:`at_rest`.
    """

    def __init__(self, texts: Texts, batch: int) -> None:
        self.texts = texts
        self.length = self.settled = 0
        self.in_generation = self.of_assistant = self.reordered = False
        self._rows = np.empty((batch, 64), np.int64)
        self._ends = np.full(batch, NO_ROW)
        self._last: np.ndarray | None = np.full(batch, NO_ROW)
        self._tokens: np.ndarray | None = np.zeros(batch, np.int64)
        self._call_start = 0
        self.stream = texts.streams(batch)

    @property
    def batch(self) -> int:
        """B."""
        return len(self._rows)

    @property
    def rows(self) -> np.ndarray:
        """Row numbers int64 (B, length); ``NO_ROW`` for padding, ``UNKNOWN_ROW`` for what the recording lacks."""
        return self._rows[:, : self.length]

    def last(self) -> np.ndarray:
        """The row that a further one would follow, int64 (B,)."""
        if self._last is None:
            self._last = _last(self.rows)
        return self._last

    def num_tokens(self) -> np.ndarray:
        """Tokens of each sequence so far, int64 (B,)."""
        if self._tokens is None:
            self._tokens = np.count_nonzero(self.rows != NO_ROW, axis=1)
        return self._tokens

    # -- what the model does -----------------------------------------------------------------------------------------

    def pad_unknown(self, length: int, valid: np.ndarray | None) -> None:
        """Places up to ``length`` were filled without us; ``valid`` bool (B, length), False for padding, if that is known."""
        new = np.full((self.batch, length - self.length), UNKNOWN_ROW)
        if valid is not None:
            new[~valid[:, self.length : length]] = NO_ROW
        self._append(new)
        self._settle()

    def append(self, rows: np.ndarray, drafts: int = 0) -> None:
        """The rows of one forward call, int64 (B, S); the last ``drafts`` of each sequence may yet be taken back."""
        self._call_start = self.length
        before, all_settled = self.length, self.settled == self.length
        self._append(rows)
        if all_settled and not drafts:
            self._settle()
            return
        if all_settled:
            self.settled = before = self.length - drafts
        self._undecided(before, self.length)
        if self.of_assistant:
            self.texts.drafting = self
        self._move_ends(_last(self.rows[:, : self.settled]))

    def settle(self) -> None:
        """The drafts that are left were accepted."""
        if self.settled < self.length:
            self._undecided(self.settled, self.length, again=True)
            self._settle()

    def accepted(self, text: np.ndarray) -> None:
        """Of a single sequence's drafts, those that are in ``text`` int (n,), all its tokens, were accepted, and no others."""
        drafts = self.rows[0, self.settled :]
        if (drafts >= self.texts.base).all():
            same = self.texts.tokens(drafts)[: max(0, len(text) - self.settled)] == text[self.settled : self.length]
            self.crop(self.settled + int(np.argmin(np.append(same, False))))

    def at_rest(self) -> None:
        """``generate`` is over: what it left is a finished text."""
        self.in_generation = self.reordered = False
        self._call_start = self.length

    def let_go(self) -> None:
        """What it holds is no text, unless it is continued."""
        for end in self._ends.tolist():
            self.texts.end(NO_ROW, end)
        self._ends = np.full(self.batch, NO_ROW)

    def cut(self, sequence: int, length: int) -> None:
        """The text of one sequence ended ``length`` places in: what was run after it is padding."""
        text, rest = self.rows[sequence, :length], self.rows[sequence, length:]
        self.texts.taken_back(_known(rest))
        self._move_ends(_last(text[None]), [sequence])

    # -- what is done with the cache ---------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Keep the first ``length`` places of each sequence.

        Inside ``generate``, and in an assistant's cache, what goes was a draft that was not accepted. So it is, most likely,
        where a part of one forward call goes; where whole calls go, a text had ended, and another shares its beginning.
        """
        if length >= self.length:
            self.settle()
            return
        generating = self.in_generation or self.of_assistant
        ended = not generating and length <= self._call_start and self.settled == self.length
        if not ended:
            gone = _known(self.rows[:, length : self.settled])
            self.texts.taken_back(gone)
            if not generating and len(gone):
                self.texts.notes["a part of a forward call that was taken back from the cache is taken for a draft"] += 1
            self._undecided(self.settled, self.length, again=True)
            self.texts.taken_back(_known(self.rows[:, max(length, self.settled) :]))
        self.length, self._call_start = length, min(length, self._call_start)
        self._last = self._tokens = None
        if ended:
            self._ends = np.full(self.batch, NO_ROW)
        self._settle()

    def select(self, indices: np.ndarray) -> None:
        """Sequence i is what sequence ``indices[i]`` was: beams that go on, or sequences that are taken out of the batch."""
        if np.array_equal(indices, np.arange(self.batch)):
            return
        if self.in_generation:
            self.reordered = True
            self.let_go()
        gone = np.setdiff1d(np.arange(self.batch), indices)
        if len(gone) and not self.in_generation:
            self.texts.notes["a sequence that was taken out of a cache is taken for a text that had ended"] += 1
        self._rows = self._rows[indices]
        self._ends = np.full(len(indices), NO_ROW)
        if len(indices) != len(self.stream):
            self.stream = self.texts.streams(len(indices))
        self._last = self._tokens = None
        self._move_ends(_last(self.rows[:, : self.settled]))

    def reset(self) -> None:
        """The cache was emptied: its texts have ended."""
        self.length = self.settled = self._call_start = 0
        self._last = self._tokens = None
        self._ends = np.full(self.batch, NO_ROW)
        self.stream = self.texts.streams(self.batch)

    # ----------------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        twin = Held(self.texts, self.batch)
        twin.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "stream"}
        twin._rows, twin._ends = self._rows.copy(), np.full(self.batch, NO_ROW)
        twin._call_start = twin.length
        twin._move_ends(_last(twin.rows[:, : twin.settled]))
        return twin

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()  # a cache in a file knows no recording

    def _append(self, rows: np.ndarray) -> None:
        while self.length + rows.shape[1] > self._rows.shape[1]:
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)], axis=1)
        self._rows[:, self.length : self.length + rows.shape[1]] = rows
        self.length += rows.shape[1]
        if rows.shape[1] == 1 and rows.min() >= 0:  # the usual step
            self._last, self._tokens = rows[:, 0], None if self._tokens is None else self._tokens + 1
        else:
            self._last = self._tokens = None

    def _undecided(self, start: int, stop: int, *, again: bool = False) -> None:
        drafts = _known(self.rows[:, start:stop])
        self.texts.taken_back(drafts, again=again)
        self.texts.undecided += -len(drafts) if again else len(drafts)

    def _settle(self) -> None:
        self.settled = self.length
        self._move_ends(self.last())

    def _move_ends(self, ends: np.ndarray, sequences: Sequence[int] | None = None) -> None:
        for sequence, end in zip(range(self.batch) if sequences is None else sequences, ends.tolist(), strict=True):
            if end == UNKNOWN_ROW:
                self._ends[sequence] = NO_ROW  # what went before ends there as far as anybody can see
            elif end != self._ends[sequence]:
                self.texts.end(end, int(self._ends[sequence]))
                self._ends[sequence] = end


def _nothing() -> None:
    return None


def _known(rows: np.ndarray) -> np.ndarray:
    return rows[rows >= 0]


def _last(rows: np.ndarray) -> np.ndarray:
    """The last place of each sequence that is no padding."""
    last = np.full(len(rows), NO_ROW)
    for place in range(rows.shape[1] - 1, -1, -1):
        last = np.where(last == NO_ROW, rows[:, place], last)
        if (last != NO_ROW).all():
            break
    return last


# -- caches of transformers ----------------------------------------------------------------------------------------------


def cache_length(cache: Any) -> int | None:
    """Places taken in a cache of transformers; None where all its layers keep a running state and no places."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def held_of(cache: Any, texts: Texts) -> Held | None:
    """What is known of ``cache``."""
    held = getattr(cache, _ATTRIBUTE, None)
    return held if isinstance(held, Held) and held.texts is texts else None


def hold(cache: Any, held: Held) -> None:
    """Let ``held`` follow ``cache``: what is done with the one is done with the other, in this cache and in no other."""
    if getattr(cache, _ATTRIBUTE, None) is held:
        return
    setattr(cache, _ATTRIBUTE, held)
    for method in (crop, reorder_cache, batch_repeat_interleave, batch_select_indices, reset):
        if hasattr(type(cache), method.__name__):
            setattr(cache, method.__name__, MethodType(method, cache))


def crop(cache: Any, *args: Any, **kwargs: Any) -> None:
    """As the cache's own."""
    type(cache).crop(cache, *args, **kwargs)
    held: Held = getattr(cache, _ATTRIBUTE)
    length = cache_length(cache)
    held.crop(held.length - abs(int((*args, *kwargs.values())[0])) if length is None else length)


def reorder_cache(cache: Any, beam_idx: Any) -> None:
    """As the cache's own."""
    type(cache).reorder_cache(cache, beam_idx)
    getattr(cache, _ATTRIBUTE).select(np.asarray(beam_idx.tolist()))


def batch_repeat_interleave(cache: Any, repeats: int) -> None:
    """As the cache's own."""
    type(cache).batch_repeat_interleave(cache, repeats)
    held: Held = getattr(cache, _ATTRIBUTE)
    held.select(np.repeat(np.arange(held.batch), repeats))


def batch_select_indices(cache: Any, indices: Any) -> None:
    """As the cache's own."""
    type(cache).batch_select_indices(cache, indices)
    held: Held = getattr(cache, _ATTRIBUTE)
    held.select(np.arange(held.batch)[np.asarray(indices.tolist())])


def reset(cache: Any) -> None:
    """As the cache's own."""
    type(cache).reset(cache)
    getattr(cache, _ATTRIBUTE).reset()
