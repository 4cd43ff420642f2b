"""How good each predictor is at each lead, how long it takes to fit, and what the learned one costs a token.

    python benchmarks/predict.py TRACE --train 0-998 --test 999-1298 [--learned FILE] [--kinds LIST] [--no-store]
    python benchmarks/predict.py TRACE --by-domain 5 --learned FILE      # every fifth label is for measuring
    python benchmarks/predict.py TRACE --by-domain 5 --split             # only say which documents the others are

Every predictor is fitted on the documents ``--train`` only and measured on ``--test``. The learned one takes long to train, so
it is read from the file that ``swapless predict train`` wrote; then its stream is timed as well, token by token on one thread,
with every pass of a token counted (before the token, and after each MoE layer for all later layers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from results import document, store

from swapless.predict import make_predictor
from swapless.predict.evaluate import evaluate
from swapless.predict.predictor import Lead, Predictor
from swapless.predict.saved import load_predictor
from swapless.trace import Trace, select
from swapless.trace.importers import load_trace

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "popularity": ("popularity", {}),
    "previous_token": ("previous_token", {}),
    "token_prior": ("token_prior", {}),
    "eam": ("eam", {}),
    "eam, 5 nearest": ("eam", {"neighbours": 5}),
    "expert_map": ("expert_map", {}),
    "linear": ("linear", {}),
}
LEADS: tuple[Lead, ...] = (1, 3, "token")
BAR_S = 6e-3
"""What all passes of one token of DeepSeek-V2-Lite's shape may take on one core."""


def measured(predictor: Predictor, test: Trace) -> dict[str, Any]:
    """Figures of the whole model at width K, by lead."""
    rows = evaluate(predictor, test, LEADS)
    names = ("recall", "average_precision", "exact_set_rate", "calibration_error", "moe_beyond", "tokens")
    return {str(row["lead"]): {name: row[name] for name in names} for row in rows if "exact_set_rate" in row}


def stream_times(predictor: Any, test: Trace, *, tokens: int) -> dict[str, Any]:
    """Seconds a token of the learned predictor's stream: all passes with all later layers, and with the next four."""
    from swapless.predict.stream import Stream

    words: Any = test.tokens if predictor.fitted_.vocabulary == "token" else test.token_id
    found: dict[str, Any] = {"bar_s": BAR_S}
    for name, ahead in (("all_later_layers", None), ("next_4_layers", 4)):
        stream, spent = Stream(predictor), []
        for t in range(min(tokens, len(test))):
            if t and test.document[t] != test.document[t - 1]:
                stream.begin_document()
            begun = time.perf_counter()
            stream.begin_token(words[t], ahead)
            for layer in range(test.num_moe_layers):
                stream.observe(layer, test.expert_ids[t, layer], ahead)
            spent.append(time.perf_counter() - begun)
        warm = spent[len(spent) // 5 :]
        tenths = statistics.quantiles(warm, n=10)
        found[name] = {"median_s": statistics.median(warm), "p10_s": tenths[0], "p90_s": tenths[-1], "tokens": len(warm)}
    return found


def by_domain(trace: Trace, every: int) -> tuple[str, str]:
    """Documents for training, and those of every ``every``-th label for measuring, as ranges of ``--documents``."""
    documents, first = np.unique(trace.document, return_index=True)
    if trace.domain is None:
        raise SystemExit("the trace has no domains to split by")
    labels = trace.domain[first]
    apart = np.isin(labels, np.unique(labels)[::every])
    return tuple(",".join(map(str, documents[chosen])) for chosen in (~apart, apart))  # type: ignore[return-value]


def main() -> None:
    """Fit, measure, print."""
    parser = argparse.ArgumentParser(description="Measure predictors on a trace.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--train", metavar="RANGE")
    parser.add_argument("--test", metavar="RANGE")
    parser.add_argument("--by-domain", type=int, metavar="N", help="instead: every Nth label for measuring")
    parser.add_argument("--split", action="store_true", help="with --by-domain: print the training documents and stop")
    parser.add_argument("--learned", type=Path)
    parser.add_argument("--kinds", default=",".join(name for name in KINDS if "," not in name))
    parser.add_argument("--tokens", type=int, default=500, help="tokens of the timed stream")
    parser.add_argument("--no-store", action="store_true")
    arguments = parser.parse_args()
    trace = load_trace(arguments.trace)
    if arguments.by_domain is not None:
        arguments.train, arguments.test = by_domain(trace, arguments.by_domain)
    if arguments.train is None or arguments.test is None:
        parser.error("give --train and --test, or --by-domain.")
    if arguments.split:
        print(arguments.train)
        return
    train, test = select(trace, documents=arguments.train), select(trace, documents=arguments.test)
    results: dict[str, Any] = {}
    for name in filter(None, arguments.kinds.split(",")):
        kind, options = KINDS[name]
        begun = time.perf_counter()
        predictor = make_predictor(kind, **options).fit(train)
        fit_s = time.perf_counter() - begun
        results[name] = {"fit_s": fit_s, **measured(predictor, test)}
        _say(name, results[name])
    cost = None
    if arguments.learned is not None:
        learned = load_predictor(arguments.learned)
        results[learned.name] = {"file_bytes": arguments.learned.stat().st_size, **measured(learned, test)}
        _say(learned.name, results[learned.name])
        if learned.name == "transformer":
            cost = stream_times(learned, test, tokens=arguments.tokens)
            print(json.dumps(cost), file=sys.stderr)
    config = {"train": arguments.train, "test": arguments.test, "model_id": trace.header.model_id, "top_k": trace.top_k}
    result = document("predict", config=config, measured={"results": results, "stream": cost})
    print(json.dumps(result, indent=2))
    if not arguments.no_store:
        print(f"stored {store(result).name}", file=sys.stderr)


def _say(name: str, figures: dict[str, Any]) -> None:
    shown = " / ".join(f"{figures[str(lead)]['recall']:.1%}" for lead in LEADS)
    print(f"{name:<16} recall at K, leads 1 / 3 / token: {shown}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
