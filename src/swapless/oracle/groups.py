"""Semantic groups: tokens that attend to one another share a group, found from left to right so that no later token matters.

The paper's rule puts token i into the group of the latest j with a_ij > eps if a_ik > eps for *all* k of the group. Rows of a
softmax sum to one, so that such cliques stay small; ours asks for a share of the group only, and for a threshold relative to
uniform attention, tau / (keys attended to).
"""

from __future__ import annotations

import numpy as np
import torch

from swapless.arrays import want
from swapless.errors import UsageError, message
from swapless.oracle._kernels import assign_groups
from swapless.oracle.state import Documents, RouterState

__all__ = ["extend_groups", "group_ids", "largest_threshold"]


def group_ids(
    scores: np.ndarray, threshold: float, *, relative: bool = True, fraction: float = 0.9, sink: int = 1
) -> np.ndarray:
    """Group of every token of whole sequences.

    Parameters
    ----------
    scores : float ndarray of shape (B, T, T)
        Attention of row i to key j, mean over heads; only j < i is read.
    threshold : float
        tau if ``relative``, else eps.
    relative : bool
        Compare with threshold / (i + 1) instead of the threshold itself.
    fraction : float
        Share of a group's members that must pass, in (0, 1]; 1 is the paper's clique.
    sink : int
        First keys that nobody's group is found by: attention rests there for want of a better place.

    Returns
    -------
    int32 ndarray of shape (B, T)
        Ids in the order in which groups begin, from 0. A prefix of a sequence has the prefix of its ids.

    Raises
    ------
    UsageError
        Scores that are not square, or a fraction outside (0, 1].

    References
    ----------
    .. [1] Zhou et al., "Oracle-MoE", ICML 2025, PMLR 267, section 2.2, definition 2 and the greedy rule after it.

    Examples
    --------
    >>> near = np.array([[[0, 0, 0], [0.9, 0, 0], [0.1, 0.9, 0]]])
    >>> group_ids(near, 0.5, relative=False, sink=0)
    array([[0, 0, 1]], dtype=int32)
    """
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2]:
        raise UsageError(message("Scores of whole sequences are square.", got=scores.shape, allowed="(B, T, T)"))
    want(scores, "scores", (np.float32, np.float64), (None, None, None))
    if not 0 < fraction <= 1:
        raise UsageError(message("The share of members that must pass is out of range.", got=fraction, allowed="(0, 1]"))
    B, T, _ = scores.shape
    gid, count = np.zeros((B, T), np.int32), np.zeros(B, np.int64)
    position = np.broadcast_to(np.arange(T), (B, T))
    limit = threshold / (position + 1.0) if relative else np.full((B, T), float(threshold))
    start = np.minimum(np.full((B, T), sink), position).astype(np.int64)
    start = np.where(position < sink, position, start)
    assign_groups(scores, start, limit, 0, fraction, gid, count)
    return gid


def extend_groups(
    scores_BNS: np.ndarray, documents: Documents, threshold_BN: np.ndarray, fraction: float, state: RouterState
) -> np.ndarray:
    """Groups of the tokens of one call, after those that ``state`` knows; ``state`` is brought up to date.

    Parameters
    ----------
    scores_BNS : float32 ndarray of shape (B, N, S)
        Attention of the call's tokens to all keys so far.
    documents : Documents
        Groups never reach beyond a document; padding has group -1.
    threshold_BN : float64 ndarray of shape (B, N)
        What an attention must exceed.
    fraction : float
        As in :func:`group_ids`.
    state : dict
        Keys ``gid`` int32 (B, S) and ``groups`` int64 (B,).

    Returns
    -------
    int64 ndarray of shape (B, N)
        Ids that count on over documents and calls.
    """
    B, N = documents.grouped_from.shape
    S = documents.past + N
    want(scores_BNS, "scores", (np.float32, np.float64), (B, N, S))
    gid = np.full((B, S), -1, np.int32)
    if "gid" in state:
        gid[:, : S - N] = state["gid"].numpy()
    count = state["groups"].numpy().copy() if "groups" in state else np.zeros(B, np.int64)
    want(count, "groups so far", np.int64, (B,))
    want(threshold_BN, "threshold", np.float64, (B, N))
    assign_groups(scores_BNS, documents.grouped_from, threshold_BN, S - N, fraction, gid, count)
    state["gid"], state["groups"] = torch.from_numpy(gid), torch.from_numpy(count)
    return gid[:, S - N :].astype(np.int64)


def largest_threshold(counts: np.ndarray, thresholds: np.ndarray, most_groups: float) -> float:
    """The largest threshold under which a sequence has at most ``most_groups`` groups in the median.

    Parameters
    ----------
    counts : int ndarray of shape (H, B)
        Groups of each of B sequences under each of H thresholds.
    thresholds : float ndarray of shape (H,)
        Candidates, ascending.
    most_groups : float
        Upper end of what is wanted; the paper finds "often fewer than 5" in 1024 tokens.

    Returns
    -------
    float
        The lowest candidate where none is low enough.
    """
    fits = np.flatnonzero(np.median(counts, axis=1) <= most_groups)
    return float(thresholds[fits[-1] if len(fits) else 0])
