"""Slow twins of the scans, written from their definitions."""

from __future__ import annotations

import numpy as np


def groups_twin(scores: np.ndarray, threshold: float, *, relative: bool, fraction: float, sink: int) -> list[int]:
    """Groups of one sequence as lists of members."""
    groups: list[list[int]] = []
    for i in range(len(scores)):
        limit = threshold / (i + 1) if relative else threshold
        near = [j for j in range(sink if i >= sink else i, i) if scores[i, j] > limit]
        home = next((group for group in groups if near and near[-1] in group), None)
        if home is not None and sum(k in near for k in home) >= fraction * len(home):
            home.append(i)
        else:
            groups.append([i])
    return [next(g for g, group in enumerate(groups) if i in group) for i in range(len(scores))]


def mean_twin(h: np.ndarray, slot: np.ndarray, decay: float) -> np.ndarray:
    """Weighted mean over all earlier tokens of the slot; a token's age is counted in tokens of its slot."""
    out = np.empty_like(h)
    for n in range(len(h)):
        members = [m for m in range(n + 1) if slot[m] == slot[n]] if slot[n] >= 0 else [n]
        weight = decay ** np.arange(len(members))[::-1]
        out[n] = (weight[:, None] * h[members]).sum(axis=0) / weight.sum()
    return out


def choose_twin(scores: np.ndarray, restart: np.ndarray, stay: float, top_k: int) -> list[list[int]]:
    """Top-k of one sequence with a bonus for those of the token before."""
    chosen: list[list[int]] = []
    held: list[int] = []
    for row, begins in zip(scores, restart, strict=True):
        bonus = dict.fromkeys(held, stay) if begins == 0 else {}
        order = sorted(range(len(row)), key=lambda e: (-(row[e] + bonus.get(e, 0.0)), e))
        chosen.append(order[:top_k])
        if begins >= 0:
            held = order[:top_k]
    return chosen


def top_mass_twin(row: np.ndarray, low: int, i: int, mass: float) -> np.ndarray:
    """The fewest largest scores among low..i-1 that reach the mass, scaled to 1."""
    out = np.zeros_like(row)
    if i <= low:
        out[i] = 1
        return out
    order = sorted(range(low, i), key=lambda s: -row[s])
    kept, total = [], row[low:i].sum()
    for s in order:
        kept.append(s)
        if row[kept].sum() >= mass * total:
            break
    out[kept] = row[kept] / row[kept].sum()
    return out


def documents_twin(ids: list[int], valid: list[bool], end: int) -> list[tuple[int, int, int]]:
    """(document, first key, keys attended to) of each token of one sequence; (-1, -1, 1) for padding."""
    out, document, start, rank, ended = [], -1, -1, 0, True
    for key, (token, real) in enumerate(zip(ids, valid, strict=True)):
        if not real:
            out.append((-1, -1, 1))
            continue
        if ended:
            document, start = document + 1, key
        rank += 1
        out.append((document, start, rank))
        ended = token == end
    return out
