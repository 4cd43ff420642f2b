"""Evaluation of predictors: it owns the information cut, and measures what keeps to it.

A predictor is asked with ``scores_batch`` over whole documents, and at points drawn at random its answer is compared with that
of ``scores``, which is handed only what exists at the cut. One that differs there looked beyond it and is refused. A
predictor that declares ``causal = False`` is measured without that check, and its rows say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from swapless.errors import PredictorError, UsageError, message
from swapless.predict._kernels import multi_hot
from swapless.predict.metrics import Tally, default_widths
from swapless.predict.predictor import Lead, Predictor, Progress, check_lead, history, known_layers, quiet
from swapless.trace import Trace

CHECKS = 4
"""Points a lead at which the batch form is compared with what the cut allows."""

_TOLERANCE = 2e-3
_CHECKED_ROWS = 96


def evaluate(
    predictor: Predictor,
    trace: Trace,
    leads: Sequence[Lead],
    *,
    widths: Sequence[int] | None = None,
    skip_positions: int = 0,
    piece_tokens: int = 4096,
    seed: int = 0,
    other_model: bool = False,
    progress: Progress = quiet,
    warn: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Recall, precision and the rest at each lead.

    Parameters
    ----------
    predictor : Predictor
        Fitted.
    trace : Trace
        Documents that it was not fitted on.
    leads : sequence of leads
        MoE layers ahead, or ``"token"``.
    widths : sequence of int, optional
        How many experts a MoE layer are fetched; some multiples of K when left out. K is always among them.
    skip_positions : int
        Leave tokens before this position out of the figures; they stay in the history.
    piece_tokens : int
        Whole documents of about so many tokens are scored at once.
    seed : int
        Of the points at which the cut is checked.
    other_model : bool
        Measure it on a trace of another model of the same shape, and say so by ``warn``.
    progress : callable
        Told stage and share done.
    warn : callable, optional
        Told what cannot be known from the headers.

    Returns
    -------
    list of dict
        Rows of ``docs/formats/predict.md``.

    Raises
    ------
    PredictorError
        The predictor says it is causal and looks beyond the cut.
    PredictorMismatchError, NotFittedError
        It is of another model, or of none.
    UsageError
        A lead or width that cannot be, or no token left to measure.
    """
    sentence = predictor.require_fitted().check(trace, other_model=other_model)
    if sentence is not None and warn is not None:
        warn(sentence)
    trace = trace.grouped()
    asked = [check_lead(lead, trace.num_moe_layers) for lead in leads]
    shown = _widths(widths, trace)
    if not (trace.position >= skip_positions).any():
        got = f"--skip-positions {skip_positions}, last position {trace.position.max()}"
        raise UsageError(message("No token is left to measure.", got=got))
    experts = predictor.fitted_.num_experts
    pieces = list(trace.pieces(max_tokens=piece_tokens))
    rows: list[dict[str, Any]] = []
    for number, lead in enumerate(asked):
        tally = Tally(trace.num_moe_layers, experts, trace.top_k, trace.domains)
        if predictor.causal:
            check_cut(predictor, pieces[0], lead, points=CHECKS, seed=seed)
        for place, piece in enumerate(pieces):
            progress(f"{predictor.name}, lead {lead}", (number + place / len(pieces)) / len(asked))
            scores = predictor.scores_batch(piece, lead)
            chosen = np.zeros(scores.shape, np.uint8)
            multi_hot(piece.expert_ids, experts, chosen)
            kept = piece.position >= skip_positions
            tally.add(scores[kept], chosen[kept], piece.position[kept], piece.domain[kept])
        rows += tally.rows(shown, predictor=predictor.name, causal=predictor.causal, lead=lead)
    return rows


def scores_of(
    predictor: Predictor,
    trace: Trace,
    lead: Lead,
    *,
    piece_tokens: int = 4096,
    seed: int = 0,
    progress: Progress = quiet,
    warn: Callable[[str], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores for whoever acts on them, from predictors that keep to the cut only.

    Parameters
    ----------
    predictor, trace, piece_tokens, seed, progress, warn
        As :func:`evaluate` takes them.
    lead : int or "token"
        The cut.

    Yields
    ------
    tuple of ndarray
        Numbers of rows of ``trace`` (n,), and their scores float32 (n, L, E), whole documents at a time.

    Raises
    ------
    PredictorError
        The predictor looks beyond the cut, whether it says so or not.
    PredictorMismatchError, NotFittedError, UsageError
        As :func:`evaluate`.
    """
    if not predictor.causal:
        what = f"The predictor {predictor.name!r} knows the future, so nothing may be read ahead by it."
        raise PredictorError(message(what, step="Use one that keeps to the cut; the bound is 'clairvoyant'."))
    sentence = predictor.require_fitted().check(trace)
    if sentence is not None and warn is not None:
        warn(sentence)
    lead = check_lead(lead, trace.num_moe_layers)
    _, first, inverse = np.unique(trace.document, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")  # rows of the trace as ``grouped`` puts them
    done = 0
    for piece in trace.pieces(max_tokens=piece_tokens):
        if not done:
            check_cut(predictor, piece, lead, points=CHECKS, seed=seed)
        progress(f"{predictor.name}, lead {lead}", done / len(trace))
        yield order[done : done + len(piece)], predictor.scores_batch(piece, lead)
        done += len(piece)


def _widths(widths: Sequence[int] | None, trace: Trace) -> list[int]:
    chosen = default_widths(trace.top_k, trace.num_experts) if widths is None else sorted({trace.top_k, *widths})
    if chosen[0] < 1 or chosen[-1] > trace.num_experts:
        allowed = f"1 to {trace.num_experts} (E)"
        raise UsageError(message("A width that cannot be.", got=list(widths or ()), allowed=allowed))
    return chosen


def check_cut(predictor: Predictor, trace: Trace, lead: Lead, *, points: int = CHECKS, seed: int = 0) -> None:
    """Compare ``scores_batch`` with ``scores`` over what exists, at some points of the first document.

    Raises
    ------
    PredictorError
        They differ: the batch form saw more.
    """
    document = trace.rows(slice(0, min(int(trace.document_offsets[1]), _CHECKED_ROWS)))
    rng = np.random.default_rng(seed)
    batch = predictor.scores_batch(document, lead)
    for _ in range(points):
        row, layer = int(rng.integers(len(document))), int(rng.integers(trace.num_moe_layers))
        seen = history(document, row, known_layers(layer, lead))
        apart = float(np.abs(predictor.scores(seen, layer, lead) - batch[row, layer]).max())
        if not apart <= _TOLERANCE:
            what = f"The predictor {predictor.name!r} says it is causal and looks beyond the cut."
            where = f"token {row}, moe_layer {layer}, lead {lead}"
            step = "Mend its scores_batch, or declare causal = False."
            raise PredictorError(message(what, where=where, got=f"scores {apart:.2g} apart", step=step))
