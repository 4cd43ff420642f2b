"""The published protocol of MoE-Beyond (arXiv 2508.17137), as its simulator runs it, so that its figures can be checked.

One LRU cache over all (MoE layer, expert) pairs, filled with random experts for every text; ten tokens of warm-up and, by an
off-by-one, the first measured row as well; then for every row the predicted experts are loaded at once and for free, and an
expert counts as a hit if it is resident after that. Not a measure of what prediction is worth: the loads are not charged, and
the figure is the recall of the predictor plus little. ``loads_per_request`` says what was moved.
"""

from __future__ import annotations

import csv
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from swapless.errors import CapacityError, TraceFormatError, message

WARMUP_TOKENS = 10
_COLUMNS = ("Layer ID", "Token", "Activated Expert IDs", "Predicted Expert IDs")

Rows = list[tuple[int, int, list[int], list[int]]]


def read_predictions(folder: str | os.PathLike[str]) -> list[Rows]:
    """Rows (token, MoE layer, chosen, predicted) of every CSV file of the folder, by file name; sorted by token and layer.

    Raises
    ------
    TraceFormatError
        No such files, a missing column, or a row that cannot be read.
    """
    files = sorted(Path(folder).glob("*.csv"))
    if not files:
        raise TraceFormatError(message("No predictions there.", where=folder, allowed="a folder of CSV files"))
    texts = []
    for file in files:
        with open(file, encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            names = {name.split("(")[0].strip(): name for name in reader.fieldnames or ()}
            missing = [column for column in _COLUMNS if column not in names]
            if missing:
                raise TraceFormatError(message("A predictions file lacks columns.", where=file, got=", ".join(missing)))
            layer, token, chosen, predicted = (names[column] for column in _COLUMNS)
            try:
                rows = [(int(r[token]), int(r[layer]), json.loads(r[chosen]), json.loads(r[predicted])) for r in reader]
            except (ValueError, TypeError) as error:
                raise TraceFormatError(
                    message("A predictions file has a row that cannot be read.", where=file, got=error)
                ) from error
        texts.append(sorted(rows, key=lambda row: row[:2]))
    return texts


def moe_beyond(
    texts: list[Rows], size: float | int, *, num_experts: int = 64, prefetch: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Replay the protocol at one cache size.

    Parameters
    ----------
    texts : list of rows
        As :func:`read_predictions` gives them.
    size : float or int
        Share of all experts that the cache holds, or their number.
    num_experts : int
        E, which the files do not say.
    prefetch : bool
        Load the predicted experts; without, this is plain LRU under the same rules.
    seed : int
        Of the random fill.

    Returns
    -------
    dict
        ``requests``, ``hits``, ``hit_rate``, ``prediction_hits``, ``loads_per_request``, ``capacity_experts``.

    Raises
    ------
    CapacityError
        No room for one expert, or for more than there are.
    """
    layers = sorted({row[1] for rows in texts for row in rows})
    keys = [(layer, expert) for layer in layers for expert in range(num_experts)]
    capacity = int(len(keys) * size) if isinstance(size, float) else size
    if not 1 <= capacity <= len(keys):
        got, allowed = f"{size} of {len(keys)} experts", f"1 to {len(keys)} in all, or a share of them"
        raise CapacityError(message("The cache cannot hold so many experts.", got=got, allowed=allowed))
    rng = np.random.default_rng(seed)
    requests = hits = foreseen = loads = 0
    for rows in texts:
        first = WARMUP_TOKENS * len(layers)
        cache = OrderedDict.fromkeys([keys[i] for i in rng.permutation(len(keys))[:capacity]])

        def access(key: tuple[int, int], cache: OrderedDict[tuple[int, int], None] = cache) -> bool:
            if key in cache:
                cache.move_to_end(key)
                return True
            if len(cache) >= capacity:
                cache.popitem(last=False)
            cache[key] = None
            return False

        for _, layer, chosen, _ in rows[: first + 1] if len(rows) > first else ():
            for expert in chosen:
                access((layer, expert))
        for _, layer, chosen, predicted in rows[first:]:
            if prefetch:
                loads += sum(not access((layer, expert)) for expert in predicted)
            for expert in chosen:
                requests += 1
                foreseen += expert in predicted
                hit = access((layer, expert))
                hits += hit
                loads += not hit
    return {
        "protocol": "moe-beyond",
        "policy": "lru + predictions" if prefetch else "lru",
        "capacity_fraction": size if isinstance(size, float) else capacity / len(keys),
        "capacity_experts": capacity,
        "pool": "shared",
        "request_model": "single",
        "requests": requests,
        "hits": hits,
        "hit_rate": hits / requests if requests else None,
        "prediction_hits": foreseen,
        "loads_per_request": loads / requests if requests else None,
    }
