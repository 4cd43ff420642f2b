"""Figures of everything that a trace is measured with, as digests: run in processes that compute in different ways.

Called as a program it prints them as JSON; with ``--learned`` also those that need training by torch, where only what is asked
of a trained predictor must agree, not the training itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from swapless import locality
from swapless.cache import POLICIES
from swapless.cache.curves import hit_rate_curves
from swapless.cache.replay import replay
from swapless.locality import chance
from swapless.predict import PREDICTORS, make_predictor
from swapless.predict.evaluate import evaluate
from swapless.predict.saved import load_predictor, save_predictor
from swapless.trace import Trace
from tests.cache.made import made_trace as drifting
from tests.predict.made import made_trace

LEADS = (1, 3, "token")
BY_TORCH = ("paper", "transformer")
OPTIONS: dict[str, dict[str, Any]] = {
    "eam": {"neighbours": 5, "capacity": 8},
    "expert_map": {"capacity": 40, "offered": 120},
    "linear": {"batch_tokens": 64},
    "transformer": {
        "sizes": {"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64},
        "epochs": 2,
        "batch_tokens": 64,
    },
}


def training_trace() -> Trace:
    """Short and long documents, whose routing has many ties."""
    rng = np.random.default_rng(3)
    return made_trace(lengths=(40, 31, 1, 17, 26, 33, 8, 9, 21, 13, 2, 5), gate_weights=rng.random((206, 4, 2)))


def fresh_trace() -> Trace:
    """Documents to score."""
    return made_trace(lengths=(21, 1, 34), seed=5, gate_weights=np.random.default_rng(4).random((56, 4, 2)))


def digest(value: Any) -> str:
    """Of arrays, results and rows: every bit counts."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            _feed(found, getattr(value, item.name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(found, part)
    elif isinstance(value, bytes):
        found.update(value)
    else:
        found.update(repr(value).encode())


def fit_and_score(folder: Path) -> dict[str, str]:
    """Every predictor that needs no torch: its file, its scores, its rows."""
    figures, fresh = {}, fresh_trace()
    kinds = [(name, name, OPTIONS.get(name, {})) for name in PREDICTORS.names() if name not in BY_TORCH]
    kinds += [
        (f"expert_map.{over}", "expert_map", {"over": over, "capacity": 40}) for over in ("gate_weights", "router_scores")
    ]
    for title, name, options in kinds:
        predictor = make_predictor(name, **options).fit(training_trace())
        save_predictor(folder / title, predictor)
        figures[f"{title} file"] = digest((folder / title).read_bytes())
        figures |= _asked(title, load_predictor(folder / title), fresh)
    return figures


def score(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """What predictors that were fitted elsewhere say here."""
    figures = {}
    for name in names:
        predictor = load_predictor(folder / name)
        figures |= _asked(name, predictor, fresh_trace())
        save_predictor(folder / f"{name}.again", predictor)
        figures[f"{name} file"] = digest((folder / f"{name}.again").read_bytes())
    return figures


def _asked(title: str, predictor: Any, fresh: Trace) -> dict[str, str]:
    found = {f"{title} {lead}": digest(predictor.scores_batch(fresh, lead)) for lead in LEADS}
    return {**found, f"{title} rows": digest(evaluate(predictor, fresh, (1,)))}


def measured() -> dict[str, str]:
    """Locality, curves and replays of one trace."""
    trace, figures = drifting(tokens=300), {}
    header = trace.header
    figures["uniform"] = digest(chance.uniform_trace(header, np.array([200, 40]), rng=np.random.default_rng(1)).expert_ids)
    figures["uniform srp"] = digest([tuple(chance.uniform_srp(s, 64, 8)) for s in (1, 16, 300)])
    figures["uniform sets"] = digest([chance.uniform_working_set(s, 64, 6) for s in (1, 16, 300)])
    figures["srp"] = digest(locality.srp(trace, [1, 16], replicates=50))
    figures["balance"] = digest([locality.balance(trace, [16]), locality.balance(trace, [16]).entropy])
    figures["reuse"] = digest(locality.reuse(trace, [16]))
    figures["curves"] = digest(hit_rate_curves(trace))
    for policy in POLICIES.names():
        for model in ("token", "single"):
            found = replay(trace, policy, 4, request_model=model)
            figures[f"{policy} {model}"] = digest(list(found.tally))
    return figures


if __name__ == "__main__":
    place = Path(sys.argv[1])
    said = {**fit_and_score(place), **measured()}
    if len(sys.argv) > 2:
        said |= score(Path(sys.argv[2]), BY_TORCH)
    print(json.dumps(said))
