"""What an expert is for: how unevenly domains use it, and how exclusively it takes its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from swapless.errors import UsageError, message
from swapless.trace.capacity import PIECE_DOCUMENTS, PIECE_TOKENS, Source, document_labels
from swapless.trace.trace import Trace

LEAST_ACTIVATION = 1e-5
LEAST_COUNT = 20
TABLE_BYTES = 128 * 2**20


class DomainSpecialization(NamedTuple):
    """Coefficient of variation over domains of how active each expert is.

    ``expert`` float64 (L, E), NaN where fewer than two domains use the expert; ``activation`` float64 (N, L, E), share of the
    (window, token) pairs of a domain; ``domains`` the N labels.
    """

    expert: np.ndarray
    activation: np.ndarray
    domains: tuple[str, ...]

    @property
    def model(self) -> float:
        """Mean over experts; NaN without one that two domains use."""
        return float(np.nanmean(self.expert)) if np.isfinite(self.expert).any() else float("nan")


class VocabularySpecialization(NamedTuple):
    """Mean share with which an expert takes the token ids that it is the main expert of.

    ``expert`` float64 (L, E), NaN for an expert that is the main one of no frequent token; ``vocabulary`` the number of
    frequent tokens.
    """

    expert: np.ndarray
    vocabulary: int


def domain_specialization(source: Source, segment_tokens: int = 16) -> DomainSpecialization:
    """Standard deviation (ddof=1) over mean, over domains, of the share of window tokens in which an expert is active.

    Parameters
    ----------
    source : Trace or TraceFile
        With domain labels; documents without one are left out.
    segment_tokens : int
        Window length S: a token counts once a window that covers it, as the published figure has it (S = 16).

    Returns
    -------
    DomainSpecialization
        Per expert, with the activation behind it. Domains in which an expert is active in less than 1e-5 are not counted
        for it.

    References
    ----------
    .. [1] arXiv:2505.16056, section 4.3.
    """
    header = source.header
    shape = (header.num_moe_layers, header.num_experts)
    active: dict[str, np.ndarray] = {}
    pairs: dict[str, int] = {}
    for piece in source.pieces(PIECE_TOKENS, PIECE_DOCUMENTS):
        weights, windows = _coverage(piece.document_offsets, segment_tokens)
        labels = document_labels(piece)
        for label in {name for name in labels if name is not None}:
            chosen = np.array([name == label for name in labels])
            pairs[label] = pairs.get(label, 0) + int(windows[chosen].sum()) * segment_tokens
            tokens = np.flatnonzero(np.repeat(chosen, np.diff(piece.document_offsets)))
            total = active.setdefault(label, np.zeros(shape))
            for layer in range(shape[0]):
                ids = piece.expert_ids[tokens, layer]
                used = ids >= 0
                weighted = np.broadcast_to(weights[tokens][:, None], ids.shape)[used]
                total[layer] += np.bincount(ids[used], weighted, minlength=shape[1])
    names = tuple(sorted(name for name, count in pairs.items() if count))
    activation = np.array([active[name] / pairs[name] for name in names]).reshape(len(names), *shape)
    counted = np.where(activation > LEAST_ACTIVATION, activation, np.nan)
    number = np.isfinite(counted).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(counted, axis=0) / number
        spread = np.sqrt(np.nansum((counted - mean) ** 2, axis=0) / (number - 1))
        return DomainSpecialization(np.where(number > 1, spread / mean, np.nan), activation, names)


def _coverage(offsets: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token the windows that cover it, and for each document its windows."""
    lengths = np.diff(offsets)
    windows = np.maximum(lengths - window + 1, 0)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    after = np.repeat(lengths, lengths) - place
    covering = np.minimum(np.minimum(place + 1, after), np.minimum(window, np.repeat(windows, lengths)))
    return covering.astype(np.float64), windows


def vocabulary_specialization(source: Source, paired: Literal["in", "out"] = "in") -> VocabularySpecialization:
    """Share of a token's occurrences that its main expert takes as top-1, averaged over the tokens of each expert.

    Parameters
    ----------
    source : Trace or TraceFile
        With ``token_id`` or ``token``, and with a known top-1: gate weights, or ids in descending order of weight.
    paired : {"in", "out"}
        Pair a routing decision with the token that went in, or with the true next token of the document.

    Returns
    -------
    VocabularySpecialization
        Over tokens that occur at least 20 times in the trace.

    Raises
    ------
    UsageError
        No tokens, or no way to tell the top-1.

    Notes
    -----
    One pass counts the tokens; further ones count top-1 uses for as many MoE layers at a time as fit ``TABLE_BYTES``.

    References
    ----------
    .. [1] arXiv:2505.16056, section 4.3: input and ground-truth-output vocabulary.
    """
    if paired not in ("in", "out"):
        raise UsageError(message("Unknown pairing of tokens.", got=repr(paired), allowed="in, out"))
    layers, experts = source.header.num_moe_layers, source.header.num_experts
    count = np.zeros(1, np.int64)
    for _, token in _decisions(source, paired):
        seen = np.bincount(token[token >= 0], minlength=len(count))
        seen[: len(count)] += count
        count = seen
    frequent = np.flatnonzero(count >= LEAST_COUNT)
    place = np.full(len(count), -1, np.int64)
    place[frequent] = np.arange(len(frequent))
    expert = np.full((layers, experts), np.nan)
    at_once = max(1, TABLE_BYTES // max(1, 4 * len(frequent) * experts))
    for first in range(0, layers if len(frequent) else 0, at_once):
        taken = np.zeros((min(at_once, layers - first), len(frequent) * experts), np.int32)
        for top1, token in _decisions(source, paired):
            row = np.where(token >= 0, place[np.maximum(token, 0)], -1)
            for layer, table in enumerate(taken, start=first):
                fine = (row >= 0) & (top1[:, layer] >= 0)
                np.add.at(table, row[fine] * experts + top1[fine, layer], 1)
        for layer, table in enumerate(taken.reshape(len(taken), len(frequent), experts), start=first):
            main, share = table.argmax(axis=1), table.max(axis=1) / count[frequent]
            owned, total = np.bincount(main, minlength=experts), np.bincount(main, share, minlength=experts)
            expert[layer] = np.divide(total, owned, out=np.full(experts, np.nan), where=owned > 0)
    return VocabularySpecialization(expert, len(frequent))


def _decisions(source: Source, paired: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Top-1 experts (T, L) and the codes (T,) of the tokens they are paired with, -1 where there is none."""
    codes: dict[str, int] = {}
    for piece in source.pieces(PIECE_TOKENS, columns=("token_id", "token", "gate_weights")):
        token, top1 = _token_codes(piece, codes), _top1(piece)
        if paired == "out":
            kept = np.delete(np.arange(len(piece)), piece.document_offsets[1:] - 1)
            token, top1 = token[kept + 1], top1[kept]
        yield top1, token


def _top1(trace: Trace) -> np.ndarray:
    if trace.gate_weights is not None:
        weights = np.where(trace.expert_ids >= 0, trace.gate_weights, np.float16(-np.inf))
        best = np.argmax(weights, axis=2)[..., None]
        return np.take_along_axis(trace.expert_ids, best, axis=2)[..., 0]
    if (trace.header.expert_order or "").startswith("descending"):
        return trace.expert_ids[:, :, 0]
    what = "This trace does not tell which of a token's experts is the first."
    step = "Record it with gate weights, or in descending order of weight."
    raise UsageError(message(what, got=trace.header.expert_order, step=step))


def _token_codes(trace: Trace, codes: dict[str, int]) -> np.ndarray:
    """Ids of the tokens, or the places at which their texts first appeared, kept in ``codes`` from piece to piece."""
    if trace.token_id is not None:
        return trace.token_id
    if trace.token is None:
        raise UsageError(message("This trace has no tokens.", step="Record it with token ids."))
    texts = trace.token.dictionary_encode()
    table = [-1 if text is None else codes.setdefault(text, len(codes)) for text in texts.dictionary.to_pylist()]
    return np.array([*table, -1], np.int64)[texts.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
