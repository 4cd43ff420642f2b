"""What is reading ahead worth? Stall and bytes a token on two devices: none, each predictor, and one that knows the future.

    python benchmarks/prefetch_value.py --data DIR [--learned FILE ...] [--learned-ms MS]     # about 10 minutes
    python benchmarks/prefetch_value.py --data DIR --quick                                    # nothing stored

DeepSeek-V2-Lite, whole Puffin documents drawn from the test range 999-1298 until there are ``--tokens`` tokens, the first
thousand not counted; the policy ``next_use`` with a cache a MoE layer, C = E/4 and E/2; NVMe Gen4 and UFS 4.0. Every row of a
capacity holds the same memory: the room for what is read ahead is taken out of the cache. ``popularity``, ``previous_token``
and ``token_prior`` are fitted on documents 0-998; what takes long to fit comes as files that ``swapless predict train`` wrote
(name them by their documents). ``--learned-ms`` is what the learned predictor takes a token on one core; it is charged whole at
every lead, and a second row leaves it out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from results import document, emit, store

from swapless.cache import DEFAULT_POLICY
from swapless.cache.capacity import pools_for
from swapless.cache.devices import device_profile
from swapless.cache.foresight import Foresight, clairvoyant, levels_of
from swapless.cache.timeline import staging_room, timeline
from swapless.predict import make_predictor
from swapless.predict.evaluate import scores_of
from swapless.predict.predictor import Lead, Predictor
from swapless.predict.saved import load_predictor
from swapless.report.prefetch import losses
from swapless.trace import Trace, read_trace, select

TRAIN, TEST = "0-998", "999-1298"
DEVICES = ("NVMe Gen4", "UFS 4.0")
SHARES = (0.25, 0.5)
LEADS: tuple[Lead, ...] = (1, 3, "token")
COUNTED = {"popularity": (1, "token"), "previous_token": (1, "token"), "token_prior": (1, "token")}
"""Fitted here, with the leads asked for: their scores are the same at every lead."""


def some_documents(trace: Trace, tokens: int, seed: int = 0) -> Trace:
    """Whole documents drawn without replacement until there are ``tokens`` tokens, in their own order."""
    documents, lengths = np.unique(trace.document, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(documents))
    chosen = order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1]
    return trace.rows(np.isin(trace.document, documents[chosen]))


def foreseen(predictor: Predictor, test: Trace, leads: Iterable[Lead]) -> Iterable[Foresight]:
    """A predictor's word at each lead."""
    for lead in leads:
        print(f"scores of {predictor.name}, lead {lead}", file=sys.stderr, flush=True)
        yield Foresight(predictor=predictor.name, lead=lead, levels=levels_of(test, scores_of(predictor, test, lead)))


def rows_of(test: Trace, foresights: list[Foresight], warmup: int) -> Iterable[dict[str, Any]]:
    """One row for each device, capacity and way of reading ahead."""
    shape = (test.num_moe_layers, test.num_experts, test.top_k)
    for name in DEVICES:
        for share in SHARES:
            whole, without = pools_for(share, *shape), None
            for seen in (None, *foresights):
                room = 0 if seen is None else staging_room(seen, test, device_profile(name))
                pools, staging = whole.less(room, test.top_k)
                given = seen and replace(seen, staging_experts=staging)
                found = timeline(test, DEFAULT_POLICY, pools, device_profile(name), warmup_tokens=warmup, foresight=given)
                row = {"policy": DEFAULT_POLICY, "capacity_fraction": share, "capacity_experts": whole.capacity_experts}
                row |= {**found.row(), "staging_experts": staging}
                without = without or row
                for figure in ("tokens_per_s", "bytes_moved_per_token", "stall_s_per_token"):
                    row[f"{figure}_ratio"] = row[figure] / without[figure]
                say(row)
                yield row


def say(row: dict[str, Any]) -> None:
    """One line of the table."""
    reads = "useful {prefetch_useful}, late {prefetch_late}, wasted {prefetch_wasted}".format(**row)
    cost = f" +{1e3 * row['predictor_s_per_token']:.0f} ms" if row["predictor_s_per_token"] else ""
    label = f"{row['prefetch']}, lead {row['lead']}{cost}" if row["prefetch"] else "none"
    print(
        f"{row['device']:9s} {row['capacity_fraction']:.0%}  {label:28s} stall {1e3 * row['stall_s_per_token']:7.1f} ms  "
        f"{row['bytes_moved_per_token'] / 1e9:.3f} GB  speed {row['tokens_per_s_ratio']:.4f}  {reads}",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Measure, print a table and one JSON document, store the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the handed data")
    parser.add_argument("--learned", type=Path, action="append", default=[], help="a saved predictor; may be given again")
    parser.add_argument("--learned-ms", type=float, default=6.0, help="what the kind 'transformer' takes a token")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--quick", action="store_true", help="few tokens, nothing stored")
    asked = parser.parse_args()
    if asked.quick:
        asked.tokens = min(asked.tokens, 400)
    warmup = min(1000, asked.tokens // 4)
    trace = read_trace(asked.data / "traces" / "deepseek-v2-lite.puffin.parquet")
    train = select(trace, documents=TRAIN)
    test = some_documents(select(trace, documents=TEST), asked.tokens)
    foresights: list[Foresight] = []
    for kind, leads in COUNTED.items():
        foresights += foreseen(make_predictor(kind).fit(train), test, leads)
    for file in asked.learned:
        for seen in foreseen(load_predictor(file), test, LEADS):
            charged = seen.predictor == "transformer" and asked.learned_ms > 0
            foresights += [seen, replace(seen, token_s=asked.learned_ms / 1e3)] if charged else [seen]
    foresights += [clairvoyant(test, lead) for lead in LEADS]
    rows = list(rows_of(test, foresights, warmup))
    for device in DEVICES:
        print(f"\n{device}", *losses([row for row in rows if row["device"] == device]), sep="\n", file=sys.stderr)
    config = {
        "policy": DEFAULT_POLICY,
        "fitted_on_documents": TRAIN,
        "test_documents": TEST,
        "drawn_documents": np.unique(test.document).tolist(),
        "tokens": len(test),
        "tokens_not_counted": warmup,
        "files": [file.name for file in asked.learned],
        "learned_ms": asked.learned_ms,
    }
    result = document("prefetch_value", config=config, measured={"rows": rows})
    emit(result)
    if not asked.quick:
        store(result)


if __name__ == "__main__":
    main()
