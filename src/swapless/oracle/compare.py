"""The table of twins: what each router costs in quality and saves in swaps, from results that `evaluate` made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from swapless.atomic import write_json
from swapless.errors import CheckpointMissingError, TraceMismatchError, UsageError, message
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.evaluate import HeldOut, evaluate
from swapless.oracle.model import OracleMoeForCausalLM
from swapless.oracle.train import Report
from swapless.runtime.door.foreign import foreign_errors
from swapless.untrusted import read_json, shown

__all__ = ["measure_run", "read_result", "recovered", "rows_of"]

_SHAPE = ("num_experts", "num_experts_per_tok", "moe_blocks", "hidden_size", "intermediate_size", "num_hidden_layers")


def load_model(folder: Path) -> OracleMoeForCausalLM:
    """The exported model, computing in float32.

    Raises
    ------
    CheckpointMissingError
        There is no model.
    UsageError
        It is of another family.
    """
    if not (folder / "config.json").exists():
        raise CheckpointMissingError(
            message("There is no trained model here.", where=folder, step="Train it first: swapless oracle train.")
        )
    family = read_json(folder / "config.json", special_floats=True).raw("model_type", None)
    if family != OracleMoeConfig.model_type:
        got = shown(family)
        raise UsageError(message("Only a model of swapless oracle train can be used here.", where=folder, got=got))
    with foreign_errors("The trained model cannot be loaded.", folder), quiet_loading():
        model = OracleMoeForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress of transformers' own."""
    shown_before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            transformers_logging.enable_progress_bar()


def measure_run(
    run: Path, data: HeldOut, *, name: str | None = None, report: Report = lambda stage, done: None
) -> dict[str, Any]:
    """The result of a finished run: what it was, and all figures of its exported model. Writes ``result.json`` in the run.

    Raises
    ------
    CheckpointMissingError
        The run is not finished.
    """
    model = load_model(run / "model")
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    config = model.config
    result = {
        "name": name or run.name,
        "recipe": recipe,
        "shape": {key: getattr(config, key) for key in _SHAPE},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": recipe["steps"] * recipe["rows"] * recipe["window_tokens"],
        "figures": evaluate(model, data, report=report),
        "training": _training(run / "log.jsonl"),
    }
    write_json(run / "result.json", result)
    return result


def _training(log: Path) -> dict[str, Any]:
    """Where the loss went, and what the fit found, from a run's log."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    steps = {line["step"]: line for line in lines if "loss" in line}  # a resumed run may have logged a step twice
    curve = [[step, round(line["loss"], 4)] for step, line in sorted(steps.items())]
    last = steps[max(steps)] if steps else {}
    fits = [line["fit"] for line in lines if "fit" in line]
    return {"curve": curve, "fit": fits[-1] if fits else None, "elapsed_s": last.get("elapsed_s"), "stay": last.get("stay")}


def read_result(path: Path) -> dict[str, Any]:
    """A result from its file, or from a run's folder.

    Raises
    ------
    CheckpointMissingError
        There is none.
    UsageError
        The file is something else.
    """
    file = path / "result.json" if path.is_dir() else path
    if not file.exists():
        raise CheckpointMissingError(message("There is no result.", where=file, step="Give a finished run and --corpus."))
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(message("This is no result of a run.", where=file, got=str(error))) from error
    if not isinstance(result, dict) or not {"name", "recipe", "figures", "shape"} <= set(result):
        raise UsageError(message("This is no result of a run.", where=file, step="Give run folders or their result.json."))
    return result


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a router and recipe, seeds put together, in the order given.

    Raises
    ------
    TraceMismatchError
        Models of different shapes, or a different number of tokens: twins are compared at equal size and data.
    """
    moe = [result for result in results if result["recipe"]["router"] != "dense"]
    for one in moe[1:]:
        if one["shape"] != moe[0]["shape"]:
            odd = [k for k in one["shape"] if one["shape"][k] != moe[0]["shape"].get(k)]
            raise TraceMismatchError(
                message(
                    "Routing of models of different shapes cannot be compared.",
                    where=one["name"],
                    got=", ".join(f"{key}={one['shape'][key]}" for key in odd),
                    allowed=", ".join(f"{key}={moe[0]['shape'].get(key)}" for key in odd) + f", as {moe[0]['name']}",
                )
            )
    tokens = {result["tokens"] for result in results}
    if len(tokens) > 1:
        raise TraceMismatchError(message("Twins must have seen the same number of tokens.", got=sorted(tokens)))
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        same = {k: v for k, v in result["recipe"].items() if k != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(result)
    return [_row(group) for group in groups.values()]


def _row(group: list[dict[str, Any]]) -> dict[str, Any]:
    figures = [result["figures"] for result in group]
    losses = [one["held_out_loss"] for one in figures]

    def mean(*path: str) -> float | None:
        values = []
        for one in figures:
            value: Any = one
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                return None
            values.append(float(np.mean(value)))
        return float(np.mean(values))

    row = {
        "name": group[0]["name"],
        "router": group[0]["recipe"]["router"],
        "seeds": len(group),
        "held_out_loss": float(np.mean(losses)),
        "standard_error": float(np.std(losses, ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None,
        "perplexity": float(np.exp(np.mean(losses))),
        "joined_loss": mean("joined_loss"),
        "joined_loss_after_seam": {band: mean("joined_loss_after_seam", band) for band in figures[0]["joined_loss_after_seam"]},
    }
    for kind in ("routing", "routing_joined", "routing_generated"):
        for key in ("changes_per_100", "experts_in_256", "experts_in_window", "load_entropy"):
            row[f"{kind}_{key}"] = mean(kind, key)
    routing = figures[0].get("routing")
    row["srp"] = routing and {s: mean("routing", "srp", s) for s in routing["srp"]}
    row["sch_of_one"] = routing and {s: mean("routing", "sch_of_one", s) for s in routing["sch_of_one"]}
    row["lru"] = routing and [
        {key: float(np.mean([one["routing"]["lru"][place][key] for one in figures])) for key in routing["lru"][place]}
        for place in range(len(routing["lru"]))
    ]
    return row


def recovered(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of what ``switch`` gains over ``dense`` that each row keeps, by name; empty without runs of those names."""
    losses = {row["name"]: row["held_out_loss"] for row in rows}
    gain = losses["dense"] - losses["switch"] if {"dense", "switch"} <= set(losses) else 0.0
    return {name: (losses["dense"] - loss) / gain for name, loss in losses.items()} if gain > 0 else {}
