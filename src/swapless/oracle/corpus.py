"""From the corpus to batches: read documents, split them, tokenise once, draw windows in an order a checkpoint can name.

A domain's training documents are one stream with an end-of-text token after each document; windows are cut from it, so
that none is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from swapless.atomic import write_whole
from swapless.errors import UsageError, message
from swapless.oracle.split import held_out_mask

__all__ = ["Document", "WindowSampler", "domain_texts", "read_documents", "token_streams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus."""

    domain: str
    source: str
    licence: str
    text: str
    held_out: bool


def read_documents(path: Path) -> list[Document]:
    """All documents of the corpus in file order, each marked held out or not by :mod:`swapless.oracle.split`.

    Raises
    ------
    UsageError
        There is no such file, or it lacks one of the columns domain, source, licence and text.
    """
    try:
        columns = pq.read_table(path, columns=["domain", "source", "licence", "text"]).to_pydict()
    except (OSError, ValueError) as error:
        raise UsageError(
            message(
                "The corpus cannot be read.", where=path, got=str(error).splitlines()[0], allowed="Parquet with those columns"
            )
        ) from error
    if set(columns) != {"domain", "source", "licence", "text"}:
        raise UsageError(message("The corpus lacks a column.", where=path, got=", ".join(columns)))
    mask = held_out_mask(columns["domain"], columns["text"])
    rows = zip(columns["domain"], columns["source"], columns["licence"], columns["text"], mask, strict=True)
    return [Document(domain=d, source=s, licence=c, text=t, held_out=h) for d, s, c, t, h in rows]


def domain_texts(documents: list[Document], *, held_out: bool) -> dict[str, list[str]]:
    """Texts of one side of the split by domain, domains in sorted order."""
    texts: dict[str, list[str]] = {domain: [] for domain in sorted({document.domain for document in documents})}
    for document in documents:
        if document.held_out == held_out:
            texts[document.domain].append(document.text)
    return texts


def token_streams(
    texts_by_domain: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, cache_dir: Path
) -> dict[str, np.ndarray]:
    """One int32 array of ids a domain, documents ended by <eos>; kept in `cache_dir` under the hash of texts and tokenizer."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for domain, texts in texts_by_domain.items():
        digest.update(domain.encode())
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
    cached = cache_dir / f"tokens-{digest.hexdigest()[:16]}.npz"
    if not cached.exists():
        streams = {}
        for domain, texts in texts_by_domain.items():
            encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            streams[domain] = np.concatenate([np.array([*e.ids, tokenizer.eos_token_id], np.int32) for e in encoded])
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_whole(cached, lambda part: _save_streams(part, streams))
    with np.load(cached) as stored:
        return {domain: stored[domain] for domain in texts_by_domain}


def _save_streams(part: Path, streams: dict[str, np.ndarray]) -> None:
    with part.open("wb") as file:  # of a path, numpy would change the name's end
        np.savez(file, allow_pickle=False, **streams)


class WindowSampler:
    """Draws batches of windows, rows spread over the domains by weight ~ size^power * boost (1 where none is given).

    Rows are placed by systematic sampling with a golden-ratio phase, so that every batch mixes as many domains as its
    rows allow and the shares hold over any few batches. `state` holds all that moves: steps drawn and windows taken a
    domain. Each pass over a domain uses another window order and another offset, both derived from (seed, domain, pass).
    """

    def __init__(
        self,
        streams: dict[str, np.ndarray],
        *,
        rows: int,
        window_tokens: int,
        power: float,
        seed: int,
        boost: Mapping[str, float] | None = None,
    ) -> None:
        for domain, stream in streams.items():
            if len(stream) < 2 * (window_tokens + 1):
                raise ValueError(
                    f"domain {domain!r} must hold two windows of {window_tokens} tokens. Got {len(stream)} tokens."
                )
        self.streams = streams
        self._streams = list(streams.values())
        self._rows, self._window_tokens, self._seed = rows, window_tokens, seed
        weights = np.array([len(stream) for stream in self._streams], float) ** power
        weights *= [(boost or {}).get(domain, 1.0) for domain in streams]
        self._edges = np.cumsum(weights / weights.sum())
        self._step = 0
        self._taken = [0] * len(self._streams)

    @property
    def state(self) -> dict[str, int | list[int]]:
        """Steps drawn, and windows taken of each domain."""
        return {"step": self._step, "taken": list(self._taken)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._step, self._taken = int(state["step"]), list(state["taken"])

    def next_batch(self) -> np.ndarray:
        """Int64 ids of shape (rows, window_tokens + 1); moves the state one step on."""
        phase = (self._step * 0.6180339887498949) % 1.0
        points = (np.arange(self._rows) + phase) / self._rows
        domains = np.minimum(np.searchsorted(self._edges, points, side="right"), len(self._streams) - 1)
        self._step += 1
        return np.stack([self._next_window(int(domain)) for domain in domains]).astype(np.int64)

    def _next_window(self, domain: int) -> np.ndarray:
        stream, W = self._streams[domain], self._window_tokens
        windows = len(stream) // W - 1  # one less, so that any offset below W fits
        epoch, index = divmod(self._taken[domain], windows)
        self._taken[domain] += 1
        rng = np.random.default_rng([self._seed, domain, epoch])
        start = int(rng.integers(W)) + int(rng.permutation(windows)[index]) * W
        return stream[start : start + W + 1]
