"""Every measure over one trace, as one document: header, settings, verdict and rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.cli import _rows as rows_of

if TYPE_CHECKING:
    from swapless.trace import Trace
    from swapless.trace.capacity import Level, Source

FORMAT_VERSION = 1
CHANCE_TOKENS, CHANCE_POOL_TOKENS, SHUFFLED_TOKENS = 20000, 4096, 50000
"""Tokens of the simulated controls: whole documents from the front of the trace."""

STAGES = {
    "SRP": 2.0,
    "reuse and balance": 3.0,
    "SCH": 4.0,
    "curves": 2.0,
    "SCH, one pool": 30.0,
    "curves, one pool": 12.0,
    "controls": 4.0,
}
"""Stages in their order, weighted by the time they take on a long trace."""

Report = Callable[[str, float], None]


def survey(
    trace: Source,
    *,
    segments: Sequence[int] = (4, 16, 64, 256),
    ratios: Sequence[float] = (1, 2, 3),
    replicates: int = 400,
    seed: int = 0,
    report: Report = lambda stage, share: None,
) -> dict[str, Any]:
    """Measure ``trace``; the result is what ``--json`` prints and the page shows.

    Parameters
    ----------
    trace : Trace or TraceFile
        What to measure.
    segments : sequence of int
        Segment lengths in tokens.
    ratios : sequence of float
        Cache sizes as multiples rho of K experts a MoE layer, and of L * K for the pool.
    replicates, seed : int
        Bootstrap over documents; seed of the controls too.
    report : callable
        Told the stage and the share done.
    """
    from swapless import locality
    from swapless.cache.curves import hit_rate_curves
    from swapless.locality import chance as control
    from swapless.locality.verdict import judge
    from swapless.trace.summary import summarize

    header = trace.header
    segments, (experts, top_k, layers) = list(segments), (header.num_experts, header.top_k, header.num_moe_layers)
    marks = sorted({min(experts, max(1, round(ratio * top_k))) for ratio in ratios})
    pool_marks = sorted({min(layers * experts, max(1, round(ratio * top_k * layers))) for ratio in ratios})
    rng = np.random.default_rng(np.random.SeedSequence([seed, experts, top_k]))
    progress = _Progress(report, STAGES)
    rows: list[rows_of.Row] = []

    advance = progress.stage("SRP")
    counted = summarize(trace)
    uniform = [control.uniform_srp(m, experts, top_k) for m in segments]
    srp = locality.srp(trace, segments, replicates=replicates, seed=seed, advance=advance)
    rows += rows_of.srp_rows(srp, uniform)
    rows.append(rows_of.row("srp_floor", "model", control.floor_srp(experts, top_k)))

    few, fewer = (np.diff(control.first_documents(trace, n).document_offsets) for n in (CHANCE_TOKENS, CHANCE_POOL_TOKENS))
    random: dict[Level, Trace] = {"moe_layer": control.uniform_trace(header, few, rng=rng, num_moe_layers=1)}
    random["model"] = control.uniform_trace(header, fewer, rng=rng)

    advance = progress.stage("reuse and balance")
    rows += _use_rows(trace, segments, srp, random["moe_layer"], advance)

    mean_rates: dict[str, Any] = {}
    bootstrap = {"replicates": replicates, "seed": seed}
    levels: list[tuple[Level, str, list[int]]] = [("moe_layer", "", marks), ("model", ", one pool", pool_marks)]
    for level, stage, at in levels:
        advance = progress.stage(f"SCH{stage}")
        for measure, share in ((locality.sch_static, 0.1), (locality.sch_lookahead, 0.9)):
            ours = measure(trace, segments, level=level, marks=at, advance=_part(advance, share))
            for curves, chance in zip(ours, measure(random[level], segments, level=level)):
                rows += rows_of.capacity_rows("sch", curves, chance, at, **bootstrap)
        advance = progress.stage(f"curves{stage}")
        ours = hit_rate_curves(trace, level=level, marks=at, advance=advance)
        for curves, chance in zip(ours, hit_rate_curves(random[level], level=level)):
            rows += rows_of.capacity_rows("hit_rate", curves, chance, at, **bootstrap)
            if level == "moe_layer":
                mean_rates[curves.variant] = [rows_of.mean_of_layers(c.rate("miss")) for c in (curves, chance)]

    advance = progress.stage("controls")
    rows += _shuffled_rows(trace, segments, uniform, marks, rng)
    lru, lru_chance = mean_rates["lru"]
    verdict = judge(lru, mean_rates["belady"][0], lru_chance, top_k=top_k, tokens=counted.num_tokens)
    progress.done()
    return {
        "format": "swapless.locality",
        "format_version": FORMAT_VERSION,
        "header": json.loads(header.to_json()),
        "trace": {
            "tokens": counted.num_tokens,
            "documents": len(counted.lengths),
            "domains": list(counted.domains),
            "phases": list(counted.phase_tokens),
        },
        "settings": {
            "segments": segments,
            "cache_ratios": [float(ratio) for ratio in ratios],
            "replicates": replicates,
            "seed": seed,
            "chance_tokens": {"moe_layer": len(random["moe_layer"]), "model": len(random["model"])},
            "shuffled_tokens": len(control.first_documents(trace, SHUFFLED_TOKENS)),
        },
        "verdict": {**asdict(verdict), "sentence": verdict.sentence(experts)},
        "rows": rows,
    }


def _use_rows(
    trace: Source, segments: list[int], srp: list[Any], random: Trace, advance: Callable[[float], None]
) -> list[rows_of.Row]:
    """Reuse, balance and specialization."""
    from swapless import locality
    from swapless.errors import UsageError
    from swapless.locality import chance as control

    experts, top_k = trace.header.num_experts, trace.header.top_k
    rate = control.uniform_overlap(experts, top_k)
    again = locality.reuse(trace, segments, advance=lambda share: advance(share / 2))
    even = locality.balance(trace, segments, advance=lambda share: advance(share / 2))
    drawn = locality.balance(random, segments)
    rest: dict[str, Any]
    rows = rows_of.by_layer("overlap", again.overlap, chance=rate)
    pooled = again.shared.sum() / again.could_share.sum() if again.could_share.sum() else None
    rows.append(rows_of.row("overlap", "model", pooled, chance=rate))
    rows += rows_of.by_layer("load_entropy", even.entropy, chance=1.0, variant="trace")
    rows += rows_of.by_layer("load_variation", even.variation, chance=0.0, variant="trace")
    for place, m in enumerate(segments):
        rest = {"segment_tokens": m}
        rows += rows_of.by_layer(
            "reuse_within", again.within[:, place], chance=control.uniform_reuse(m, experts, top_k), **rest
        )
        expected = control.uniform_working_set(m, experts, top_k)
        rows += rows_of.by_layer("working_set", again.working_set[:, place], chance=expected, **rest)
        rows += rows_of.by_layer(
            "load_entropy", even.window_entropy[:, place], chance=drawn.window_entropy[0, place], variant="segment", **rest
        )
        rows += rows_of.by_layer(
            "load_variation",
            even.window_variation[:, place],
            chance=drawn.window_variation[0, place],
            variant="segment",
            **rest,
        )
        rows.append(rows_of.row("load_deviation", "model", even.deviation[place], chance=0.0, **rest))
    total = even.load.sum(axis=1, keepdims=True)
    share = np.divide(even.load, total, out=np.full(even.load.shape, np.nan), where=total > 0)
    rows += rows_of.by_expert("load_share", share, chance=1 / experts)
    special = locality.domain_specialization(trace)
    if len(special.domains) > 1:
        rest = {"variant": "domain", "segment_tokens": 16}
        rows += rows_of.by_expert("specialization", special.expert, **rest)
        rows.append(rows_of.row("specialization", "model", special.model, **rest))
        for result in srp:
            if result.segment_tokens == 16:
                value = correlation(special.expert.ravel(), result.expert.value.ravel())
                rows.append(rows_of.row("specialization_srp_correlation", "model", value, **rest))
    for paired in ("in", "out"):
        try:
            vocabulary = locality.vocabulary_specialization(trace, paired)
        except UsageError:  # no token texts or no known top-1: the measure has no rows, as its description says
            break
        rest = {"variant": f"vocabulary_{paired}"}
        rows += rows_of.by_expert("specialization", vocabulary.expert, **rest)
        rows.append(rows_of.row("specialization", "model", _mean(vocabulary.expert), **rest))
    return rows


def _shuffled_rows(
    trace: Source, segments: list[int], uniform: list[Any], marks: list[int], rng: np.random.Generator
) -> list[rows_of.Row]:
    """SRP and LRU of the same tokens in random order: what imbalance alone gives."""
    from swapless import locality
    from swapless.cache.curves import hit_rate_curves
    from swapless.locality import chance as control

    mixed = control.shuffled_trace(control.first_documents(trace, SHUFFLED_TOKENS), rng=rng)
    rest: dict[str, Any]
    rows = []
    for result, random in zip(locality.srp(mixed, segments), uniform):
        rest = {"segment_tokens": result.segment_tokens}
        rows.append(rows_of.row("srp_shuffled", "model", result.model.value, chance=float(random.value), **rest))
        for layer, value in enumerate(result.moe_layer.value.tolist()):
            rows.append(rows_of.row("srp_shuffled", "moe_layer", value, moe_layer=layer, **rest))
    for curves in hit_rate_curves(mixed, ["lru"], marks=marks):
        for cold in ("free", "miss"):
            for place, value in enumerate(rows_of.mean_of_layers(curves.rate(cold)).tolist()):
                rest = {"variant": "lru", "capacity_experts": place + 1, "cold": cold}
                rows.append(rows_of.row("hit_rate_shuffled", "layer_mean", value, **rest))
    return rows


def _part(advance: Callable[[float], None], share: float) -> Callable[[float], None]:
    return lambda done: advance(done * share)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation over the places where both are finite; NaN for fewer than two or a constant side."""
    fine = np.isfinite(first) & np.isfinite(second)
    if fine.sum() < 2 or np.ptp(first[fine]) == 0 or np.ptp(second[fine]) == 0:
        return float("nan")
    x, y = (values[fine] - values[fine].mean() for values in (first, second))  # sums, since products of BLAS differ by machine
    return float(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))


def _mean(values: np.ndarray) -> float:
    fine = np.isfinite(values)
    return float(values[fine].mean()) if fine.any() else float("nan")


class _Progress:
    """Shares of the stages as one share of the whole."""

    def __init__(self, report: Report, stages: dict[str, float]) -> None:
        self._report, self._weight = report, stages
        self._total, self._before, self._name, self._share = sum(self._weight.values()), 0.0, "", 0.0

    def stage(self, name: str) -> Callable[[float], None]:
        self._before += self._weight.get(self._name, 0.0)
        self._name, self._share = name, 0.0
        self._tell()
        return self._advance

    def _advance(self, share: float) -> None:
        self._share = min(1.0, self._share + share)
        self._tell()

    def _tell(self) -> None:
        self._report(self._name, (self._before + self._weight[self._name] * self._share) / self._total)

    def done(self) -> None:
        self._report("done", 1.0)


def json_lines(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One JSON document in pieces, one row a line: the survey itself, or ``{"traces": [...]}`` for several."""
    several = len(documents) > 1
    if several:
        yield '{"format": "swapless.locality", "format_version": 1, "traces": [\n'
    for number, document in enumerate(documents):
        head = {name: value for name, value in document.items() if name != "rows"}
        yield (",\n" if number else "") + json.dumps(head, ensure_ascii=False, allow_nan=False)[:-1] + ', "rows": [\n'
        last = len(document["rows"]) - 1
        for place, entry in enumerate(document["rows"]):
            yield json.dumps(entry, ensure_ascii=False, allow_nan=False) + ("\n" if place == last else ",\n")
        yield "]}"
    yield "\n]}\n" if several else "\n"
