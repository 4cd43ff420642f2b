"""``swapless demo``: the embedded model writes one text at three residencies, then two twins write with little memory.

The three texts are the same; the twins show what the routing itself can save.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swapless.cli import _options as options
from swapless.cli.out import Out
from swapless.cli.session import Sampling, generate, measured, open_model, open_tokenizer, prompt_ids, rate, share, size
from swapless.errors import VerifyError, message
from swapless.units import format_size

__all__ = ["demo"]

RESIDENCIES = (0.25, 0.5, 1.0)
"""Least first: the peak of a process only rises, so each run's own peak is seen."""

PROMPT = "Once upon a time, there was a little"
_SAMPLING = Sampling(max_new_tokens=64, min_new_tokens=64, temperature=0.5, top_p=0.9, seed=1)
_THREADS = 1
"""The model is too small to share out, and one thread gives the same bits on every machine."""

_WARM_UP = Sampling(max_new_tokens=2)

TWIN_PROMPT = "def read_file(path):\n"
_TWIN_SAMPLING = Sampling(max_new_tokens=96, min_new_tokens=96, temperature=0.7, top_p=0.9, seed=1)
_TWIN_NAMES = {"switch": "routes by the token", "theme-gate": "routes by the theme of the text"}


def demo(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show the main job on the embedded model.

    One prompt, one seed, three cache sizes: the text stays the same, the bytes read change. Needs no network.
    """
    from swapless.embedded import path

    out = Out(as_json=as_json, quiet=quiet)
    checkpoint = str(path())
    runs = [_run(checkpoint, residency, out) for residency in RESIDENCIES]
    identical = len({run["text"] for run in runs}) == 1
    out.table(
        ("resident", "slots", "hit rate", "read a token", "tok/s", "stall", "peak memory"),
        [
            (
                f"{run['resident']:.0%}",
                f"{run['slots']} of {run['experts']}",
                share(run["hit_rate"]),
                size(run["bytes_read_per_token"]),
                rate(run["tokens_per_s"]),
                share(run["stall_share"]),
                size(run["peak_memory_bytes"]),
            )
            for run in runs
        ],
    )
    if not identical:
        raise VerifyError(
            message("The three texts differ.", allowed="the same text at each residency", step="Please report it.")
        )
    out.text("\nThe three texts are the same, character for character: fewer experts in memory cost time, never quality.\n")
    twins = _twins(out)
    out.document({"prompt": PROMPT, "seed": _SAMPLING.seed, "identical": identical, "runs": runs, "twins": twins})
    out.text("hit rate      experts that were in memory before their token asked for them")
    out.text("read a token  bytes that had to come from the disk for each new token")
    out.text("stall         share of the time that computing waited for those bytes\n")
    out.text("Next:")
    out.text(f'  swapless run {checkpoint} --resident 25% --prompt "def main():"')
    out.text(f"  swapless info {checkpoint}")
    out.text("  swapless run YOUR_CHECKPOINT --memory 8GiB --chat")


def _twins(out: Out) -> list[dict[str, Any]]:
    """Both twins on one prompt, with one expert of each MoE layer in memory."""
    from swapless.embedded import TWINS, twin

    out.text("Two models of one size and one training, with room for a single expert in each of their MoE layers:\n")
    rows = []
    for router in TWINS:
        checkpoint = str(twin(router))
        tokenizer = open_tokenizer(checkpoint)
        with open_model(checkpoint, out, threads=_THREADS, resident=1 / _experts_a_layer(checkpoint)) as model:
            out.text(f"{router}: {_TWIN_NAMES[router]}")
            rows.append({"router": router} | _written(model, tokenizer, TWIN_PROMPT, _TWIN_SAMPLING, out))
    out.table(
        ("twin", "experts swapped", "read in all", "tok/s", "stall"),
        [
            (
                row["router"],
                f"{row['requests'] - row['hits']} in {row['new_tokens']} tokens",
                size(row["decode_bytes_read"]),
                rate(row["tokens_per_s"]),
                share(row["stall_share"]),
            )
            for row in rows
        ],
    )
    out.text("\nExperts this small are read in a blink; in a model of real size each swap costs milliseconds.\n")
    return rows


def _written(model: Any, tokenizer: Any, prompt: str, sampling: Sampling, out: Out) -> dict[str, Any]:
    """Let the model, warmed up, go on from the prompt for all to see; returns the figures."""

    def show(piece: str) -> None:
        out.text(piece.replace("\n", "\n    "), end="")

    ids = prompt_ids(tokenizer, prompt)
    generate(model, tokenizer, ids, _WARM_UP, lambda piece: None)
    model.swapless.reset_stats()
    show("    " + prompt)
    reply = generate(model, tokenizer, ids, sampling, show)
    out.text("\n")
    return measured(reply, model.swapless)


def _experts_a_layer(checkpoint: str) -> int:
    return int(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))["num_experts"])


def _run(checkpoint: str, residency: float, out: Out) -> dict[str, Any]:
    with open_model(checkpoint, out, threads=_THREADS, resident=residency) as model:
        tokenizer = open_tokenizer(checkpoint)
        budget = model.swapless.budget
        if residency == RESIDENCIES[0]:
            config = model.config.get_text_config()
            out.text(
                f"The model inside this package ({config.model_type}) has {budget.num_experts_total} experts of "
                f"{format_size(budget.expert_bytes)} in its files.\nIt writes one text three times, each time with more of "
                f"them in memory; the others are read when the router asks.\n"
            )
        out.text(f"{residency:.0%} of the experts in memory ({budget.slots} of {budget.num_experts_total})")
        figures = _written(model, tokenizer, PROMPT, _SAMPLING, out)
        return {"resident": residency, "experts": budget.num_experts_total} | figures
