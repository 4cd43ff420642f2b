"""``swapless info TRACE``: the header of a trace and its basic statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swapless.cli._trace_options import opened_trace
from swapless.cli.out import Out

__all__ = ["info_trace"]


def info_trace(path: Path, as_json: bool = False) -> None:
    """Print what a trace is: its model, its rows, and how even and how local its routing is at first sight."""
    import numpy as np

    from swapless.locality import balance, reuse
    from swapless.notation import Phase
    from swapless.trace.summary import summarize

    with opened_trace(path) as trace:
        counted, again, even = summarize(trace, trace.columns), reuse(trace, [16]), balance(trace, [16])
        header, columns = trace.header, trace.columns
    lengths = counted.lengths
    pooled = float(again.shared.sum() / again.could_share.sum()) if again.could_share.sum() else float("nan")
    facts: dict[str, Any] = {
        "tokens": counted.num_tokens,
        "documents": len(lengths),
        "tokens_a_document": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "phases": {phase.label: counted.phase_tokens.get(phase.label, 0) for phase in Phase},
        "domains": len(counted.domains),
        "columns": list(columns),
        "unused_places": counted.unused_places,
        "experts_never_used": int((even.load == 0).sum()),
        "overlap": pooled,
        "overlap_random": header.top_k / header.num_experts,
        "load_entropy": _mean(even.entropy),
        "working_set_16": _mean(again.working_set),
    }
    out = Out(as_json=as_json)
    out.document({"kind": "trace", "file": path.name, "header": json.loads(header.to_json()), **facts})
    blocks = f"{header.moe_blocks[0]}-{header.moe_blocks[-1]}" if header.num_moe_layers > 1 else f"{header.moe_blocks[0]}"
    shape = f"{header.num_moe_layers} MoE layers (blocks {blocks}), {header.num_experts} experts, top-{header.top_k}"
    pairs = [("trace", str(path)), ("model", header.model_id or "not named"), ("shape", shape)]
    pairs += [(name, getattr(header, name)) for name in ("source", "licence", "notes") if getattr(header, name)]
    span = facts["tokens_a_document"]
    tokens = f"{counted.num_tokens:,} in {len(lengths):,} documents of {span['min']:,} to {span['max']:,}"
    pairs.append(("tokens", tokens))
    pairs.append(("phases", ", ".join(f"{name} {count:,}" for name, count in counted.phase_tokens.items())))
    pairs.append(("domains", ", ".join(counted.domains[:8]) + (", ..." if len(counted.domains) > 8 else "") or "not labelled"))
    pairs.append(("columns", ", ".join(["expert_ids", *columns])))
    pairs.append(("never used", f"{facts['experts_never_used']:,} of {even.load.size:,} experts"))
    if np.isfinite(pooled):
        random = f"random {facts['overlap_random']:.1%}"
        pairs.append(("overlap", f"{pooled:.1%} of a token's experts served the token before ({random})"))
    if np.isfinite(facts["load_entropy"]):
        pairs.append(("load entropy", f"{facts['load_entropy']:.1%} of an even load"))
    if np.isfinite(facts["working_set_16"]):
        pairs.append(("16 tokens touch", f"{facts['working_set_16']:.1f} experts a MoE layer"))
    out.facts(pairs)


def _mean(values: Any) -> float:
    """Mean of the finite values; NaN without any."""
    import numpy as np

    fine = values[np.isfinite(values)]
    return float(fine.mean()) if len(fine) else float("nan")
