"""What was run as a text, and the experts that plain transformers' routers choose over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
)

from swapless.notation import Phase
from swapless.trace import Trace

CLEAR = 1e-4
"""A choice is compared where the last expert chosen and the first left out are so far apart: elsewhere rounding decides."""


def routed_by(plain: Any, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts (T, L, K) that the routers of a plain model choose over a text, seen through hooks, and by how much (T, L)."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        logits, _, experts = output
        best = logits.detach().float().topk(experts.shape[1] + 1).values
        seen.append((experts.numpy(), (best[:, -2] - best[:, -1]).numpy()))

    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in plain.model.layers]
    with torch.no_grad():
        plain(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([ids for ids, _ in seen], 1), np.stack([margin for _, margin in seen], 1)


def check(trace: Trace, plain: Any, texts: Sequence[Sequence[int]], *, compare_tokens: bool = True) -> None:
    """A document for each of ``texts`` (in any order), and in it the experts that plain transformers chooses."""
    assert trace.num_documents == len(texts), [trace.position[trace.document == d].tolist() for d in np.unique(trace.document)]
    left = [list(map(int, text)) for text in texts]
    for document in range(trace.num_documents):
        rows = trace.rows(trace.document == document)
        assert rows.position.tolist() == list(range(len(rows)))
        said = rows.token_id.tolist() if rows.token_id is not None and compare_tokens else left[0]
        match = next((text for text in left if all(a in (b, -1) for a, b in zip(said, text)) and len(said) == len(text)), None)
        assert match is not None, f"no text is {said}, of {left}"
        left.remove(match)
        experts, margin = routed_by(plain, match)
        same = (rows.expert_ids == experts).all(axis=2)
        assert same[margin > CLEAR].all(), f"document {document}, rows {np.argwhere(~same & (margin > CLEAR))[:4].tolist()}"
        assert (margin > CLEAR).mean() > 0.9


def check_counts(model: Any) -> None:
    """The counters count the rows that the trace has."""
    trace, stats = model.swapless.trace(), model.swapless.stats()
    phases = trace.phase.tolist()
    assert stats.prefill_tokens == phases.count(Phase.PREFILL)
    assert stats.decode_tokens == phases.count(Phase.DECODE)


GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


class Cycle(LogitsProcessor):
    """Makes any model say 5 6 7 8 9 5 6 ..., with a slip now and then: drafts of it are accepted in part."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        following = (input_ids[:, -1] - 4) % 5 + 5
        if input_ids.shape[1] % 6 == 0:
            following = following + 20
        return torch.full_like(scores, -100.0).scatter(1, following[:, None], 0.0)


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> list[list[int]]:
    """Texts that are run when ``model`` generates: all but the last token, which is never fed back."""
    return model.generate(prompt, **GREEDY | {"attention_mask": torch.ones_like(prompt)} | options)[:, :-1].tolist()


def prefix_cache(model: Any, prefix: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    return cache


def continued(prefix: torch.Tensor, tail: Sequence[int]) -> torch.Tensor:
    return torch.cat([prefix, torch.tensor([list(tail)])], 1)
