"""Perplexity as decoding sees it: token after token, each with the state of those before it, never as one wide batch.

A batch of many tokens touches each expert once and adds up in another order than a decode step (torch's own products do), so it
cannot say what fewer bits or a lossy lever cost a person who waits for the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from swapless.errors import UsageError, message
from swapless.runtime.one_sequence import decode_steps

Progress = Callable[[int, int], None]
"""Told the tokens scored so far, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """What a text costs a model: ``nats`` over ``tokens`` scored tokens, in ``windows`` of at most ``context_tokens``."""

    nats: float
    tokens: int
    windows: int
    context_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean of the negative log-likelihoods."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp`` of that mean; infinite where it is too large for a float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the derived ones included."""
        return asdict(self) | {"nats_per_token": self.nats_per_token, "perplexity": self.perplexity}


def perplexity(
    model: Any, tokenizer: Any, text: str, *, most_tokens: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of ``text`` under ``model``, in decode steps of one token.

    The text is cut into windows of the model's context (``model.swapless.budget.context_tokens``), each decoded from an
    empty cache. Where the tokenizer puts a token before every text, each window begins with it and all tokens of the text are
    scored. Elsewhere a window begins with the last token of the one before, so that all tokens but the very first are
    scored, each once.

    Parameters
    ----------
    model : PreTrainedModel
        From :func:`swapless.load`, at any residency: the figure does not depend on it.
    tokenizer : PreTrainedTokenizer
        The model's own.
    text : str
        What is scored.
    most_tokens : int, optional
        Score so many tokens at the most, from the beginning.
    progress : callable of (tokens, tokens), optional
        Told after every token.

    Raises
    ------
    UsageError
        The text has too few tokens for one to be scored, or the context has room for one token alone.
    """
    context_tokens = model.swapless.budget.context_tokens
    if context_tokens < 2:
        raise UsageError(message("The context is too short to score a token.", got=context_tokens, allowed="2 tokens or more"))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = _start_of_text(tokenizer)
    if len(ids) < (1 if start is not None else 2):
        raise UsageError(message("The text has too few tokens to score one.", got=f"{len(ids)} tokens", allowed="2 or more"))
    if start is not None:
        ids = [start, *ids]
    scored = len(ids) - 1 if most_tokens is None else min(most_tokens, len(ids) - 1)
    ids = ids[: scored + 1]
    nats, done, windows = 0.0, 0, 0
    for window in _windows(ids, context_tokens, start):
        windows += 1
        for loss in _losses(model, window):
            nats += loss
            done += 1
            if progress is not None:
                progress(done, scored)
    return Perplexity(nats=nats, tokens=done, windows=windows, context_tokens=context_tokens)


def _start_of_text(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before a text by itself, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    start = tokenizer.bos_token_id
    return start if start is not None and list(first) == [start] else None


def _windows(ids: list[int], context_tokens: int, start: int | None) -> Iterator[list[int]]:
    """Runs of at most ``context_tokens``; the first token of each is not scored, and every other token is in one of them."""
    step = context_tokens - 1
    for first in range(0, len(ids) - 1, step):
        window = ids[first : first + context_tokens]
        yield window if start is None else [start, *window[1:]]


def _losses(model: Any, window: list[int]) -> Iterator[float]:
    for output, following in zip(decode_steps(model, window[:-1]), window[1:], strict=True):
        yield -torch.log_softmax(output.logits[0, -1].double(), dim=-1)[following].item()
