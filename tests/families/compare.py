"""Run one model the way the sweep does, and tell how far two runs are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.families.tiny import clone_weights

NEW_TOKENS = 5
PROMPT_TOKENS = 9


class Prompts(NamedTuple):
    """A batch of 2: ``ids`` and ``mask`` int64 (2, PROMPT_TOKENS)."""

    ids: torch.Tensor
    mask: torch.Tensor


class Run(NamedTuple):
    """What one model made of the prompts.

    ``prefill`` logits (n, vocabulary) of every prompt token that is no padding; ``steps`` logits (2, NEW_TOKENS, vocabulary)
    of the greedy decode steps; ``tokens`` int64 (2, PROMPT_TOKENS + NEW_TOKENS).
    """

    prefill: torch.Tensor
    steps: torch.Tensor
    tokens: torch.Tensor


def prompts(*, left_padded: bool, vocabulary: int = 128) -> Prompts:
    """The same random tokens every time; with ``left_padded`` the second sequence is shorter."""
    ids = torch.randint(3, vocabulary, (2, PROMPT_TOKENS), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    if left_padded:
        mask[1, :3] = 0
        ids[1, :3] = 0
    return Prompts(ids, mask)


@torch.no_grad()
def run(model: Any, given: Prompts) -> Run:
    """Prefill once, then generate greedily."""
    logits = model(input_ids=given.ids, attention_mask=given.mask).logits
    done = model.generate(
        input_ids=given.ids,
        attention_mask=given.mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Run(logits[given.mask.bool()], torch.stack(done.logits, 1), done.sequences)


def reference(folder: Path, cls: Any, implementation: str | None = "eager") -> Any:
    """The checkpoint in plain transformers, its weights aligned; None leaves the choice of implementation to transformers."""
    chosen = {} if implementation is None else {"experts_implementation": implementation}
    return clone_weights(cls.from_pretrained(folder, **chosen).eval())
