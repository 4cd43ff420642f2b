"""``swapless info TRACE``: the header of a trace and its basic statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swapless.cli.out import Out

__all__ = ["info_trace"]


def info_trace(path: Path, as_json: bool = False) -> None:
    """Print what a trace is: its model, its rows, and how even and how local its routing is at first sight."""
    import numpy as np

    from swapless.locality import balance, reuse
    from swapless.notation import Phase
    from swapless.trace.importers import load_trace

    trace = load_trace(path)
    header = trace.header
    lengths = np.diff(trace.grouped().document_offsets)
    again, even = reuse(trace, [16]), balance(trace, [16])
    optional = ("token_id", "token", "step", "gate_weights", "router_scores")
    pooled = float(again.shared.sum() / again.could_share.sum()) if again.could_share.sum() else float("nan")
    facts: dict[str, Any] = {
        "tokens": len(trace),
        "documents": len(lengths),
        "tokens_a_document": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "phases": {phase.label: int((trace.phase == phase).sum()) for phase in Phase},
        "domains": len(np.unique(trace.domain[trace.domain >= 0])),
        "columns": [name for name in optional if getattr(trace, name) is not None],
        "unused_places": int((trace.expert_ids < 0).sum()),
        "experts_never_used": int((even.load == 0).sum()),
        "overlap": pooled,
        "overlap_random": trace.top_k / trace.num_experts,
        "load_entropy": float(np.nanmean(even.entropy)),
        "working_set_16": float(np.nanmean(again.working_set)) if again.windows[0] else float("nan"),
    }
    out = Out(as_json=as_json)
    out.document({"kind": "trace", "file": path.name, "header": json.loads(header.to_json()), **facts})
    blocks = f"{header.moe_blocks[0]}-{header.moe_blocks[-1]}" if header.num_moe_layers > 1 else f"{header.moe_blocks[0]}"
    shape = f"{header.num_moe_layers} MoE layers (blocks {blocks}), {header.num_experts} experts, top-{header.top_k}"
    pairs = [("trace", str(path)), ("model", header.model_id or "not named"), ("shape", shape)]
    pairs += [(name, getattr(header, name)) for name in ("source", "licence", "notes") if getattr(header, name)]
    span = facts["tokens_a_document"]
    pairs.append(("tokens", f"{len(trace):,} in {len(lengths):,} documents of {span['min']} to {span['max']}"))
    pairs.append(("phases", ", ".join(f"{name} {count:,}" for name, count in facts["phases"].items() if count)))
    pairs.append(("domains", str(facts["domains"]) if facts["domains"] else "not labelled"))
    pairs.append(("columns", ", ".join(["expert_ids", *facts["columns"]])))
    pairs.append(("never used", f"{facts['experts_never_used']:,} of {even.load.size:,} experts"))
    pairs.append(
        ("overlap", f"{pooled:.1%} of a token's experts served the token before (random {facts['overlap_random']:.1%})")
    )
    pairs.append(("load entropy", f"{facts['load_entropy']:.1%} of an even load"))
    if again.windows[0]:
        pairs.append(("16 tokens touch", f"{facts['working_set_16']:.1f} experts a MoE layer"))
    out.facts(pairs)
