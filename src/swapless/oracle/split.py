"""Which documents a model may train on: one rule for every model of this project, so that their held-out texts agree.

The rule reads nothing but the document itself (and, for tiny domains, its neighbours in the same domain): no seed, no
order, no file position.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

HELD_OUT_FRACTION = 0.1
MIN_HELD_OUT_DOCUMENTS = 3


def document_score(domain: str, text: str) -> float:
    """A number in [0, 1) that depends on domain and text alone; low scores are held out."""
    digest = hashlib.sha256(domain.encode() + b"\0" + text.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def held_out_mask(domains: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Say for each document whether it is held out.

    Parameters
    ----------
    domains, texts : sequences of str, of equal length
        The whole corpus, in any order.

    Returns
    -------
    list of bool
        True for a document whose score is under 0.1, and for the three lowest scores of a domain, so that a domain of
        few documents is measured too.

    Raises
    ------
    ValueError
        The lengths differ, or a domain has too few distinct documents to train on any after holding three out.

    Notes
    -----
    Equal documents of one domain have equal scores, so that copies never stand on both sides.

    Examples
    --------
    >>> sum(held_out_mask(["a"] * 4, ["one", "two", "three", "four"]))
    3
    """
    if len(domains) != len(texts):
        raise ValueError(f"domains and texts must have equal lengths. Got {len(domains)} and {len(texts)}.")
    scores = [document_score(domain, text) for domain, text in zip(domains, texts, strict=True)]
    by_domain: dict[str, set[float]] = defaultdict(set)
    for domain, score in zip(domains, scores, strict=True):
        by_domain[domain].add(score)
    thresholds = {}
    for domain, distinct in by_domain.items():
        if len(distinct) <= MIN_HELD_OUT_DOCUMENTS:
            raise ValueError(
                f"domain {domain!r} must have over {MIN_HELD_OUT_DOCUMENTS} distinct documents. Got {len(distinct)}."
            )
        thresholds[domain] = max(HELD_OUT_FRACTION, sorted(distinct)[MIN_HELD_OUT_DOCUMENTS])
    return [score < thresholds[domain] for domain, score in zip(domains, scores, strict=True)]
