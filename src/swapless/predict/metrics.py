"""How good scores are: recall and precision at widths, average precision, calibration, exact sets; the published paper's own.

All counts are sums over (token, MoE layer) pairs, so that pieces of a trace can be measured one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

POSITIONS = (0, 1, 4, 16, 64, 256, 1024)
"""First position of each bucket."""

BINS = 20


@dataclass(slots=True)
class Tally:
    """Sums over what was measured so far.

    Parameters
    ----------
    num_moe_layers, num_experts, top_k : int
        L, E, K.
    domains : tuple of str
        Labels, in the order of their codes.
    """

    num_moe_layers: int
    num_experts: int
    top_k: int
    domains: tuple[str, ...] = ()
    tokens: int = 0
    hits: np.ndarray = field(init=False)
    chosen: np.ndarray = field(init=False)
    precision_sum: float = 0.0
    pairs: int = 0
    exact: int = 0
    bins: np.ndarray = field(init=False)
    by_position: np.ndarray = field(init=False)
    by_domain: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.hits = np.zeros((self.num_moe_layers, self.num_experts), np.int64)
        self.chosen = np.zeros(self.num_moe_layers, np.int64)
        self.bins = np.zeros((3, BINS))
        self.by_position = np.zeros((3, len(POSITIONS)), np.int64)
        self.by_domain = np.zeros((3, len(self.domains) + 1), np.int64)

    def add(self, scores: np.ndarray, chosen: np.ndarray, position: np.ndarray, domain: np.ndarray) -> None:
        """Take in scores (T, L, E) against choices of 0 and 1 (T, L, E); equal scores stand in order of expert id."""
        order = np.argsort(-scores, axis=2, kind="stable")
        found = np.take_along_axis(chosen, order, 2)
        upto = np.cumsum(found, axis=2, dtype=np.int16)
        wanted = upto[:, :, -1]
        self.tokens += len(scores)
        self.hits += upto.sum(axis=0, dtype=np.int64)
        self.chosen += wanted.sum(axis=0, dtype=np.int64)
        some = wanted > 0
        share = (found * upto / np.arange(1, self.num_experts + 1, dtype=np.float32)).sum(axis=2)
        self.precision_sum += float((share / np.maximum(wanted, 1))[some].sum(dtype=np.float64))
        self.pairs += int(some.sum())
        last = np.take_along_axis(upto, np.maximum(wanted, 1)[:, :, None].astype(np.int64) - 1, 2)[:, :, 0]
        self.exact += int((last == wanted)[some].sum())
        place = np.clip((scores * BINS).astype(np.int64), 0, BINS - 1).reshape(-1)
        for row, weight in enumerate((None, scores.reshape(-1), chosen.reshape(-1))):
            self.bins[row] += np.bincount(place, weight, minlength=BINS)
        top = upto[:, :, self.top_k - 1].sum(axis=1, dtype=np.int64)
        asked = wanted.sum(axis=1, dtype=np.int64)
        buckets = np.searchsorted(POSITIONS, position, side="right") - 1
        for sums, label in ((self.by_position, buckets), (self.by_domain, np.where(domain < 0, len(self.domains), domain))):
            for row, values in enumerate((top, asked, np.ones_like(top))):
                np.add.at(sums[row], label, values)

    def rows(self, widths: list[int], **head: Any) -> list[dict[str, Any]]:
        """One row a width: the model's first, then each MoE layer's; ``head`` goes before the figures."""
        rows = []
        for width in widths:
            hits = self.hits[:, width - 1]
            rows.append(
                {**head, "moe_layer": None, "width": width, **_rates(hits.sum(), self.chosen.sum(), width, self._places())}
                | {"tokens": self.tokens}
                | (self.summary() if width == self.top_k else {})
            )
        for width in widths:
            for layer in range(self.num_moe_layers):
                figures = _rates(self.hits[layer, width - 1], self.chosen[layer], width, self.tokens)
                rows.append({**head, "moe_layer": layer, "width": width, **figures, "tokens": self.tokens})
        return rows

    def _places(self) -> int:
        return self.tokens * self.num_moe_layers

    def summary(self) -> dict[str, Any]:
        """What has no width of its own: average precision, exact sets, calibration, positions, domains, the paper's."""
        count, said, true = self.bins
        used = count > 0
        gap = float(np.abs(said[used] - true[used]).sum() / count.sum()) if used.any() else None
        ends = (*POSITIONS[1:], None)
        positions = [
            {"first": first, "end": end, "recall": _share(hit, asked), "tokens": int(tokens)}
            for first, end, hit, asked, tokens in zip(POSITIONS, ends, *self.by_position)
            if tokens
        ]
        domains = [
            {"domain": name, "recall": _share(hit, asked), "tokens": int(tokens)}
            for name, hit, asked, tokens in zip((*self.domains, None), *self.by_domain)
            if tokens
        ]
        return {
            "average_precision": _share(self.precision_sum, self.pairs),
            "exact_set_rate": _share(self.exact, self.pairs),
            "calibration_error": gap,
            "calibration": [
                {name: float(value) for name, value in zip(("said", "chosen", "share"), row)}
                for row in np.stack([said[used] / count[used], true[used] / count[used], count[used] / count.sum()], 1)
            ],
            "positions": positions,
            "domains": domains,
            "moe_beyond": self.published(),
        }

    def published(self) -> dict[str, float | None]:
        """Accuracy and macro-F1 as MoE-Beyond's code computes them, without padding, and those of predicting nothing.

        Labels are all (token, MoE layer, expert) triples; the prediction is the K best. "Macro" is the mean of the F1 of the
        two classes, chosen and not.

        References
        ----------
        .. [1] MoE-Beyond, arXiv:2508.17137: 97.5 % and 86.6 %, with padding counted as right.
        """
        labels = self._places() * self.num_experts
        hits, chosen = int(self.hits[:, self.top_k - 1].sum()), int(self.chosen.sum())
        said = self._places() * self.top_k
        wrong = (said - hits) + (chosen - hits)
        rest = labels - said - chosen + hits  # neither said nor chosen
        f1 = 2 * hits / (said + chosen) if said + chosen else 0.0
        f1_rest = 2 * rest / (2 * rest + wrong) if rest or wrong else 0.0
        nothing = (labels - chosen) * 2 / (2 * labels - chosen) if labels else 0.0
        return {
            "accuracy": _share(labels - wrong, labels),
            "macro_f1": (f1 + f1_rest) / 2,
            "all_zeros_accuracy": _share(labels - chosen, labels),
            "all_zeros_macro_f1": nothing / 2,
        }


def _rates(hits: Any, chosen: Any, width: int, places: int) -> dict[str, float | None]:
    return {"recall": _share(hits, chosen), "precision": _share(hits, width * places)}


def _share(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def default_widths(top_k: int, num_experts: int) -> list[int]:
    """K, and one and a half, two, three and four times it, as far as there are experts."""
    return sorted({min(num_experts, round(top_k * factor)) for factor in (1, 1.5, 2, 3, 4)})
