"""``swapless demo``: the embedded model writes one text at three residencies, and the three texts are the same."""

from __future__ import annotations

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


def demo(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show the main job on the embedded model.

    One prompt, one seed, three cache sizes: the text stays the same, the bytes read change. Needs no network.
    """
    from swapless.embedded import path

    out = Out(as_json=as_json, quiet=quiet)
    checkpoint = str(path())
    runs = [_run(checkpoint, residency, out) for residency in RESIDENCIES]
    identical = len({run["text"] for run in runs}) == 1
    out.document({"prompt": PROMPT, "seed": _SAMPLING.seed, "identical": identical, "runs": runs})
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
    out.text("hit rate      experts that were in memory before their token asked for them")
    out.text("read a token  bytes that had to come from the disk for each new token")
    out.text("stall         share of the time that computing waited for those bytes\n")
    out.text("Next:")
    out.text(f'  swapless run {checkpoint} --resident 25% --prompt "def main():"')
    out.text(f"  swapless info {checkpoint}")
    out.text("  swapless run YOUR_CHECKPOINT --memory 8GiB --chat")


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
        ids = prompt_ids(tokenizer, PROMPT)
        generate(model, tokenizer, ids, _WARM_UP, lambda piece: None)
        model.swapless.reset_stats()
        out.text(f"{residency:.0%} of the experts in memory ({budget.slots} of {budget.num_experts_total})")
        out.text(f"    {PROMPT}", end="")
        reply = generate(model, tokenizer, ids, _SAMPLING, lambda piece: out.text(piece.replace("\n", "\n    "), end=""))
        out.text("\n")
        return {"resident": residency, "experts": budget.num_experts_total} | measured(reply, model.swapless)
