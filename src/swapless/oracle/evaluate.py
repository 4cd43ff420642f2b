"""What a trained model is worth, and how it routes, on text it never saw: single domains, and texts made of three.

The same windows for every model: they depend on corpus, tokenizer and window length alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from swapless.cache.replay import replay
from swapless.errors import UsageError, message
from swapless.locality import balance, reuse, sch_lookahead, srp
from swapless.oracle.model import OracleMoeForCausalLM
from swapless.trace import Trace, TraceHeader

__all__ = ["HeldOut", "Read", "evaluate", "held_out", "read", "routing_figures"]

SEAM_BANDS = ((0, 16), (16, 64), (64, 512))
"""Tokens after a change of domain, in bands: how fast a router adapts."""
SEGMENTS = (16, 64, 256)
SHARES = (0.25, 0.5, 0.75, 1.0)
_ROWS = 8


class HeldOut(NamedTuple):
    """``domains`` name to int64 (W, T + 1); ``joined`` int64 (J, T + 1) whose three parts begin at 0 and at ``seams`` (J, 2)
    and are of ``parts`` (J, 3) by name."""

    domains: dict[str, np.ndarray]
    joined: np.ndarray
    seams: np.ndarray
    parts: list[list[str]]


class Read(NamedTuple):
    """``losses`` float32 (W, T) in nats, ``experts`` int16 (W, T, L, K) (L = 0 for a dense model)."""

    losses: np.ndarray
    experts: np.ndarray


def held_out(
    streams: dict[str, np.ndarray], *, window_tokens: int, end: int | None, windows: int = 16, joined: int = 51, seed: int = 0
) -> HeldOut:
    """Windows of every domain's held-out text, and texts of three domains, parted where no document ends if that can be had.

    Raises
    ------
    UsageError
        Fewer than three domains, or one too short for a window.
    """
    T = window_tokens
    short = [domain for domain, stream in streams.items() if len(stream) <= T]
    if len(streams) < 3 or short:
        raise UsageError(
            message(
                "The held-out text must hold a window of three domains or more.",
                got=f"{len(streams)} domains" + (f", {', '.join(short)} under {T + 1} tokens" if short else ""),
                step="Take a larger corpus, or shorter windows.",
            )
        )
    domains = {}
    for domain, stream in streams.items():
        count = min(windows, (len(stream) - 1) // T)
        domains[domain] = np.stack([stream[w * T : (w + 1) * T + 1] for w in range(count)]).astype(np.int64)
    rng = np.random.default_rng(seed)
    names = sorted(streams)
    texts, seams, parts = [], [], []
    for number in range(joined):
        others = rng.permutation([name for name in names if name != names[number % len(names)]])[:2]
        chosen = [names[number % len(names)], *map(str, others)]
        cuts = np.sort(rng.integers([T // 4, T // 2 + T // 12], [T // 2 - T // 12, 3 * T // 4]))
        lengths = np.diff([0, *cuts, T + 1])
        texts.append(np.concatenate([_span(streams[name], int(n), end, rng) for name, n in zip(chosen, lengths, strict=True)]))
        seams.append(cuts)
        parts.append(chosen)
    return HeldOut(domains, np.stack(texts).astype(np.int64), np.stack(seams), parts)


def _span(stream: np.ndarray, tokens: int, end: int | None, rng: np.random.Generator) -> np.ndarray:
    for _ in range(64):
        start = int(rng.integers(len(stream) - tokens + 1))
        if end not in stream[start : start + tokens]:
            break
    return stream[start : start + tokens]


@torch.no_grad()
def read(model: OracleMoeForCausalLM, ids: np.ndarray, advance: Callable[[int], None] = lambda rows: None) -> Read:
    """Let the model read windows (W, T + 1), each from its beginning."""
    losses, experts = [], []
    for begin in range(0, len(ids), _ROWS):
        ids_BT = torch.from_numpy(ids[begin : begin + _ROWS]).to(model.device)
        out = model(ids_BT[:, :-1], use_cache=False)
        B, T = ids_BT[:, :-1].shape
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(B, T).cpu().numpy())
        experts.append(_stacked(out.expert_ids, B, T))
        advance(B)
    return Read(np.concatenate(losses), np.concatenate(experts))


def _stacked(expert_ids: tuple[Tensor, ...], B: int, T: int) -> np.ndarray:
    if not expert_ids:
        return np.zeros((B, T, 0, 1), np.int16)
    return torch.stack(expert_ids, dim=1).view(B, T, len(expert_ids), -1).cpu().numpy().astype(np.int16)


@torch.no_grad()
def continued(model: OracleMoeForCausalLM, prompts: np.ndarray, new_tokens: int, seed: int = 0) -> np.ndarray:
    """Prompts (B, P) with sampled continuations, int64 (B, P + N); no token ends them."""
    torch.manual_seed(seed)
    any_model: Any = model  # transformers' annotation of generate's self does not fit its own models
    found = any_model.generate(
        torch.from_numpy(prompts).to(model.device),
        attention_mask=torch.ones_like(torch.from_numpy(prompts)).to(model.device),
        min_new_tokens=new_tokens,  # so that no text ends
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        pad_token_id=0,
    )
    return np.asarray(found.cpu().numpy())


def trace_of(model: OracleMoeForCausalLM, experts: np.ndarray, labels: list[str]) -> Trace:
    """A trace whose documents are windows, int16 (W, T, L, K), labelled by domain."""
    config = model.config
    W, T, L, K = experts.shape
    header = TraceHeader(
        model_id=f"oracle-moe/{config.router}",
        num_experts=config.num_experts,
        top_k=K,
        moe_blocks=tuple(config.moe_blocks or ()),
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        source="held-out windows, teacher-forced",
    )
    return Trace.from_arrays(
        header,
        expert_ids=experts.reshape(W * T, L, K),
        document=np.repeat(np.arange(W, dtype=np.int32), T),
        domain=[label for label in labels for _ in range(T)],
    )


def expert_bytes(model: OracleMoeForCausalLM) -> int:
    """Bytes of one expert in bfloat16."""
    D, F_ = model.config.hidden_size, model.config.moe_intermediate_size
    return 2 * (2 * D * F_ + D + F_)


def routing_figures(trace: Trace, bytes_an_expert: int) -> dict[str, Any]:
    """The table's columns for one trace: rates per MoE layer, caches by share; LRU starts cold and is kept over documents."""
    T = int(np.diff(trace.document_offsets).max())
    windows = [s for s in (256, T) if s <= T]
    repeats = reuse(trace, windows)
    E = trace.header.num_experts
    caches = []
    for capacity in sorted({1, *(max(1, round(share * E)) for share in SHARES)}):
        found = replay(trace, "lru", capacity, pool="layer", expert_bytes=bytes_an_expert)
        misses = (found.requests - found.hits) / len(trace)
        caches.append(
            {
                "experts_a_layer": capacity,
                "share": capacity / E,
                "misses_a_token": misses,
                "bytes_a_token": found.bytes_read_per_token,
            }
        )
    segments = [s for s in SEGMENTS if s <= T] or [T]
    looked = sch_lookahead(trace, segments)
    return {
        "changes_per_100": [100 * (1 - float(x)) for x in repeats.overlap],
        "experts_in_256": [float(x) for x in repeats.working_set[:, 0]],
        "experts_in_window": [float(x) for x in repeats.working_set[:, -1]],
        "load_entropy": [float(x) for x in balance(trace).entropy],
        "srp": {str(r.segment_tokens): float(r.model.value) for r in srp(trace, segments)},
        "sch_of_one": {str(s): float(np.mean(c.rate("free")[..., 0])) for s, c in zip(segments, looked, strict=True)},
        "sch_of_two": {
            str(s): float(np.mean(c.rate("free")[..., min(1, E - 1)])) for s, c in zip(segments, looked, strict=True)
        },
        "lru": caches,
    }


def evaluate(
    model: OracleMoeForCausalLM,
    data: HeldOut,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 192,
    report: Callable[[str, float], None] = lambda stage, done: None,
) -> dict[str, Any]:
    """All figures of one model, ready for JSON.

    Parameters
    ----------
    model : OracleMoeForCausalLM
        In evaluation mode.
    data : HeldOut
        From :func:`held_out`.
    prompt_tokens, new_tokens : int
        Of the generated texts, one a domain; fewer where a window holds no more.
    report : callable
        Told the stage and the share done.
    """
    rows = sum(map(len, data.domains.values())) + len(data.joined)
    done = 0

    def advance(read_rows: int) -> None:
        nonlocal done
        done += read_rows
        report("reading held-out text", 0.8 * done / rows)

    reads = {domain: read(model, ids, advance) for domain, ids in data.domains.items()}
    joined = read(model, data.joined, advance)
    by_domain = {domain: float(found.losses.mean()) for domain, found in reads.items()}
    figures: dict[str, Any] = {
        "held_out_loss": float(np.mean(list(by_domain.values()))),
        "held_out_losses": by_domain,
        "joined_loss": float(joined.losses.mean()),
        "joined_loss_after_seam": seam_losses(joined.losses, data.seams),
    }
    if not model.config.moe_blocks:
        return figures
    labels = [domain for domain, found in reads.items() for _ in range(len(found.losses))]
    size = expert_bytes(model)
    report("measuring routing", 0.8)
    experts = np.concatenate([found.experts for found in reads.values()])
    figures["expert_bytes"] = size
    figures["routing"] = routing_figures(trace_of(model, experts, labels), size)
    figures["routing_joined"] = routing_figures(trace_of(model, joined.experts, ["joined"] * len(joined.losses)), size)
    report("generating", 0.9)
    window = data.joined.shape[1] - 1
    prompt_tokens = min(prompt_tokens, window // 2)
    prompts = np.stack([ids[0, :prompt_tokens] for ids in data.domains.values()])
    texts = continued(model, prompts, min(new_tokens, window - prompt_tokens))
    written = read(model, texts).experts[:, prompt_tokens - 1 :]
    figures["routing_generated"] = routing_figures(trace_of(model, written, list(data.domains)), size)
    figures["strip"] = {
        "experts": joined.experts[0, :, :, 0].T.tolist(),
        "seams": data.seams[0].tolist(),
        "parts": data.parts[0],
        "num_experts": model.config.num_experts,
        "blocks": list(model.config.moe_blocks or ()),
    }
    return figures


def seam_losses(losses_WT: np.ndarray, seams: np.ndarray) -> dict[str, float | None]:
    """Mean loss of the tokens so far behind a seam, by band; None where there are none.

    A token is predicted from the one before it.
    """
    place = np.arange(losses_WT.shape[1]) + 1  # of the predicted token
    behind = np.full(losses_WT.shape, -1)
    for row, cuts in enumerate(seams):
        for cut in cuts:
            behind[row] = np.where(place >= cut, place - cut, behind[row])
    bands = {f"{a}-{b}": losses_WT[(behind >= a) & (behind < b)] for a, b in SEAM_BANDS}
    return {name: float(losses.mean()) if losses.size else None for name, losses in bands.items()}
