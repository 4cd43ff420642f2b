"""Text as it is generated: whole characters, in order, the answer apart from the thinking, and nothing of a stop string."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from swapless.cli.response import ResponseFormat, ResponseReader, response_format

__all__ = ["TextStream"]

_CONTEXT_TOKENS = 6
"""Tokens of the prompt decoded along with the first new ones: a word's leading space depends on what stands before it."""


class TextStream:
    """A streamer for ``model.generate`` that hands finished text to ``write`` at once.

    It holds back bytes of an unfinished character and any tail that may still become a stop string. Special tokens are not
    part of the text, but a stop string may name one. ``put`` and ``end`` are what transformers calls; the first ``put`` brings
    the prompt.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Turns ids into text.
    write : callable of str
        Receives each piece of the answer, never empty.
    stop : sequence of str
        The text ends before the first of these; :attr:`stopped` then says so.
    response : ResponseFormat, None or "auto"
        How the family tells thinking from answer; None takes everything as the answer, ``"auto"`` asks the tokenizer.
    think : callable of str, optional
        Receives each piece of what is thinking.

    Attributes
    ----------
    text, thinking : str
        The answer and the thinking so far.
    problem : str or None
        Why the text could not be told apart, if so.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        stop: Sequence[str] = (),
        *,
        response: ResponseFormat | Literal["auto"] | None = "auto",
        think: Callable[[str], None] | None = None,
    ) -> None:
        self.stopped = False
        self.text = ""
        self.thinking = ""
        self.problem: str | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._tokenizer = tokenizer
        self._write, self._show_thinking = write, think
        self._stop = tuple(stop)
        self._form = response_format(tokenizer) if response == "auto" else response
        self._reader: ResponseReader | None = None
        self._special = _special_texts(tokenizer)
        self._ids: list[int] = []
        self._prompt_tokens: int | None = None
        self._from = 0
        self._done = 0
        self._held: list[tuple[str, bool]] = []

    @property
    def new_ids(self) -> list[int]:
        """Ids generated so far, special ones included."""
        return self._ids[self._prompt_tokens or 0 :]

    def put(self, value: Any) -> None:
        """Take the prompt's ids, then one token a call; writes what is finished."""
        ids = value.reshape(-1).tolist()
        if self._prompt_tokens is None:
            self._ids += ids
            self._prompt_tokens = self._done = len(ids)
            self._from = max(0, len(ids) - _CONTEXT_TOKENS)
            self._read_apart(ids)
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        for number in ids:
            self._ids.append(number)
            if number in self._special:
                self._decode(whole=True)
                self._take(self._special[number], special=True)
            else:
                self._decode(whole=False)

    def end(self) -> None:
        """Write what was held back: the generation is over."""
        self._decode(whole=True)
        if not self.stopped:
            self._release(sum(len(text) for text, _ in self._held))
        if self._reader is not None:
            self._guarded(self._reader.end)

    def message(self) -> dict[str, str]:
        """The answer as a turn of a conversation, the thinking under the name that chat templates know."""
        turn = {"role": "assistant", "content": self.text}
        return turn | ({"reasoning_content": self.thinking.strip()} if self.thinking.strip() else {})

    def _read_apart(self, prompt: list[int]) -> None:
        if self._form is None:
            return
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        self._guarded(lambda: self._start_reader(text))

    def _start_reader(self, prompt: str) -> None:
        assert self._form is not None
        self._reader = ResponseReader(self._form, self._tokenizer, prompt, self._answer, self._think)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Take a step of reading apart; what does not fit its format is plain text from there on."""
        try:
            step()
        except Exception as error:  # the template is the checkpoint's own, and its parser raises whatever it meets
            self._reader = None
            self.problem = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")

    def _decode(self, *, whole: bool) -> None:
        known, text = (self._text(ids) for ids in (self._ids[self._from : self._done], self._ids[self._from :]))
        if len(text) > len(known) and (whole or not text.endswith("\ufffd")):
            self._from, self._done = self._done, len(self._ids)
            self._take(text[len(known) :])

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _take(self, piece: str, *, special: bool = False) -> None:
        if self.stopped or not piece:
            return
        if self._held and not special and not self._held[-1][1]:
            piece = self._held.pop()[0] + piece
        self._held.append((piece, special))
        held = "".join(text for text, _ in self._held)
        found = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            self._release(min(found))
            self._held = []
            return
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._release(len(held) - keep)

    def _release(self, letters: int) -> None:
        """Pass on so many letters of what is held."""
        while letters > 0 and self._held:
            text, special = self._held.pop(0)
            ready, rest = text[:letters], text[letters:]
            letters -= len(ready)
            if rest:
                self._held.insert(0, (rest, special))
            self._pass_on(ready, special)

    def _pass_on(self, text: str, special: bool) -> None:
        reader = self._reader
        if reader is None:
            if not special:
                self._answer(text)
        else:
            self._guarded(lambda: reader.feed(text, special=special))
            if self._reader is None and not special:
                self._answer(text)

    def _answer(self, piece: str) -> None:
        if not self.text and self.thinking:
            piece = piece.lstrip("\n")
        if piece:
            self.text += piece
            self._write(piece)

    def _think(self, piece: str) -> None:
        self.thinking += piece
        if piece and self._show_thinking is not None:
            self._show_thinking(piece)


def _special_texts(tokenizer: Any) -> dict[int, str]:
    """Ids that are no part of any text, with what they are called."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {number: str(token) for number, token in added.items() if token.special}
    return known | dict(zip(getattr(tokenizer, "all_special_ids", ()), map(str, getattr(tokenizer, "all_special_tokens", ()))))


def _overlap(text: str, stop: str) -> int:
    """Longest end of ``text`` that begins ``stop``, in characters."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
