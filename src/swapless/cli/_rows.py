"""Results of the measures as rows of one shape; what each measure means stands in ``docs/formats/locality.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

FIELDS = (
    "measure",
    "variant",
    "level",
    "moe_layer",
    "expert",
    "domain",
    "segment_tokens",
    "capacity_experts",
    "cold",
    "value",
    "chance",
    "ci_low",
    "ci_high",
)
Row = dict[str, Any]


def row(measure: str, level: str, value: Any, **rest: Any) -> Row:
    """One row: unknown places are null, and so is a value that is not a number."""
    filled: Row = dict.fromkeys(FIELDS)
    filled |= rest
    filled["measure"], filled["level"], filled["value"] = measure, level, value
    for name in ("value", "chance", "ci_low", "ci_high"):
        number = filled[name]
        filled[name] = None if number is None or not np.isfinite(number) else float(number)
    return filled


def by_layer(measure: str, values: np.ndarray, *, chance: float | None = None, **rest: Any) -> list[Row]:
    """Rows of each MoE layer and, at level ``layer_mean``, of their mean."""
    rows = [row(measure, "moe_layer", v, moe_layer=layer, chance=chance, **rest) for layer, v in enumerate(values.tolist())]
    finite = values[np.isfinite(values)]
    mean = finite.mean() if len(finite) else None
    return [*rows, row(measure, "layer_mean", mean, chance=chance, **rest)]


def by_expert(measure: str, values: np.ndarray, *, chance: float | None = None, **rest: Any) -> list[Row]:
    """Rows of each expert of each MoE layer, from values (L, E)."""
    return [
        row(measure, "expert", value, moe_layer=layer, expert=expert, chance=chance, **rest)
        for layer, values_of_layer in enumerate(values.tolist())
        for expert, value in enumerate(values_of_layer)
    ]


def srp_rows(results: Iterable[Any], chance: Iterable[Any]) -> list[Row]:
    """SRP, its relative size and the activation at every level, over all documents and a domain at a time."""
    rows = []
    for result, random in zip(results, chance):
        m = {"segment_tokens": result.segment_tokens}
        pairs = (("srp", "value"), ("srp_relative_size", "relative_size"))
        for measure, name in pairs:
            expected = float(getattr(random, name))
            interval = result.model_interval if name == "value" else None
            ends = {} if interval is None else {"ci_low": interval.low, "ci_high": interval.high}
            rows.append(row(measure, "model", getattr(result.model, name), chance=expected, **m, **ends))
            for layer, value in enumerate(getattr(result.moe_layer, name).tolist()):
                ends = {}
                if name == "value":
                    low, high = result.moe_layer_interval
                    ends = {"ci_low": low[layer], "ci_high": high[layer]}
                rows.append(row(measure, "moe_layer", value, moe_layer=layer, chance=expected, **m, **ends))
            rows += by_expert(measure, getattr(result.expert, name), chance=expected, **m)
            for place, label in enumerate(result.domains):
                if label is None:
                    continue
                value = getattr(result.domain_model, name)[place]
                rows.append(row(measure, "model", value, domain=label, chance=expected, **m))
                for layer, value in enumerate(getattr(result.domain_moe_layer, name)[place].tolist()):
                    rows.append(row(measure, "moe_layer", value, moe_layer=layer, domain=label, chance=expected, **m))
        rows += by_expert("activation_rate", result.expert.activation, **m)
    return rows


def capacity_rows(
    measure: str, curves: Any, chance: Any | None, marks: Sequence[int], *, replicates: int = 0, seed: int = 0
) -> list[Row]:
    """Rows of every capacity: each MoE layer and their mean, or the pool; with intervals and domains at the marks."""
    rows: list[Row] = []
    rest = {"variant": curves.variant, "segment_tokens": curves.segment_tokens}
    for cold in ("free", "miss"):
        said = None if curves.variant == "static" else cold
        if said is None and cold == "miss":
            continue
        rates = curves.rate(cold)
        expected = np.full(rates.shape[1], np.nan) if chance is None else mean_of_layers(chance.rate(cold))
        ends = mark_intervals(curves, 0 if cold == "free" else 1, replicates=replicates, seed=seed)
        mean = mean_of_layers(rates)
        groups: list[tuple[str, int | None, np.ndarray]] = []
        if curves.level == "moe_layer":
            groups = [("moe_layer", layer, values) for layer, values in enumerate(rates)]
        groups.append(("layer_mean" if curves.level == "moe_layer" else "model", None, mean))
        for level, layer, values in groups:
            for place, (value, random) in enumerate(zip(values.tolist(), expected.tolist())):
                low, high = ends.get(place + 1, (None, None)) if layer is None else (None, None)
                placed = {"moe_layer": layer, "capacity_experts": place + 1, "cold": said, "ci_low": low, "ci_high": high}
                rows.append(row(measure, level, value, chance=random, **placed, **rest))
        for label in curves.domains:
            if label is None:
                continue
            mean = mean_of_layers(curves.rate(cold, label))
            for mark in marks:
                placed = {"domain": label, "capacity_experts": mark, "cold": said, "chance": expected[mark - 1]}
                rows.append(row(measure, groups[-1][0], mean[mark - 1], **placed, **rest))
    return rows


def mean_of_layers(rates: np.ndarray) -> np.ndarray:
    """Mean over MoE layers of rates (G, C), leaving out layers without requests; NaN where none has any."""
    fine = np.isfinite(rates)
    count = fine.sum(axis=0)
    return np.divide(np.where(fine, rates, 0).sum(axis=0), count, out=np.full(rates.shape[1], np.nan), where=count > 0)


def mark_intervals(curves: Any, convention: int, *, replicates: int, seed: int) -> dict[int, tuple[float, float]]:
    """Reverse-percentile bootstrap over documents of the mean rate at each mark; empty for a single document.

    The documents drawn are those that SRP draws for its intervals.
    """
    documents = len(curves.document_requests)
    if documents < 2 or not curves.marks or not replicates:
        return {}
    rng = np.random.default_rng(np.random.SeedSequence([seed, documents]))
    hits = curves.document_hits[:, convention].reshape(documents, -1).astype(np.float64)
    drawn = np.empty((replicates, len(curves.marks)))
    shape = curves.document_hits.shape[2:]
    for number in range(replicates):
        weights = np.bincount(rng.integers(documents, size=documents), minlength=documents).astype(np.float64)
        requests = weights @ curves.document_requests
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn[number] = mean_of_layers((weights @ hits).reshape(shape) / requests[:, None])
    rates = mean_of_layers(curves.rate("free" if convention == 0 else "miss"))
    if not np.isfinite(drawn).all():  # a replicate without any request: too few documents to say anything
        return {}
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        mark: (2 * rates[mark - 1] - high[place], 2 * rates[mark - 1] - low[place]) for place, mark in enumerate(curves.marks)
    }
