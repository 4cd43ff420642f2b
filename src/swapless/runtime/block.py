"""The experts of one MoE block: what is missing is read while what is here is computed.

Decode reads all misses of a wave at once and computes residents meanwhile. Prefill walks the experts in ascending order and
reads ahead of itself; an expert that gets no slot passes through a staging slot. Either way outputs are added in ascending
expert id and no expert's tokens are split, so the result does not depend on what was resident.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from swapless.cache.serve import Served
from swapless.runtime.compute import Experts, Routed
from swapless.runtime.fetch import Fetcher


def decode_block(
    fetcher: Fetcher,
    experts_of_block: Experts,
    module: Any,
    moe_layer: int,
    served: Served,
    tokens: Routed,
    out_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
) -> torch.Tensor:
    """Add the experts' share of a decode step to ``out_TD``; each of ``served`` has a slot."""
    slot_of = dict(zip(served.experts.tolist(), served.slot.tolist(), strict=True))
    waves: list[list[int]] = [[] for _ in range(served.waves)]
    here: list[int] = []
    for expert, hit, wave in zip(served.experts.tolist(), served.hit.tolist(), served.wave.tolist(), strict=True):
        (here if hit else waves[wave]).append(expert)
    outputs: dict[int, torch.Tensor] = {}
    prefetcher = fetcher.prefetcher

    def compute(experts: list[int]) -> None:
        blocks = [fetcher.block(slot_of[expert]) for expert in experts]
        hidden = [tokens.gather(expert) for expert in experts]
        outputs.update(zip(experts, experts_of_block(module, moe_layer, blocks, hidden), strict=True))

    for number, wave in enumerate(waves):
        coming = 0
        for expert in wave:
            if fetcher.demand(moe_layer, expert, slot_of[expert]):
                here.append(expert)
            else:
                coming += 1
        if prefetcher is not None and number == len(waves) - 1:
            prefetcher.reads.pass_by(moe_layer)
            prefetcher.look(moe_layer, hidden_TD)
        if here:
            compute(here)
        here = []
        while coming:
            landed = fetcher.arrivals()
            for read in landed:
                fetcher.settle(read, slot_of[read.expert])
            coming -= len(landed)
            compute([read.expert for read in landed])
    tokens.add(out_TD, outputs)
    return out_TD


def prefill_block(
    fetcher: Fetcher,
    experts_of_block: Experts,
    module: Any,
    moe_layer: int,
    served: Served,
    tokens: Routed,
    out_TD: torch.Tensor,
) -> torch.Tensor:
    """Add the experts' share of many tokens to ``out_TD``; some of ``served`` may have no slot."""
    slot_of: dict[int, int] = dict(zip(served.experts.tolist(), served.slot.tolist(), strict=True))
    hits = {expert for expert, hit in zip(served.experts.tolist(), served.hit.tolist(), strict=True) if hit}
    to_read = deque(sorted(expert for expert in slot_of if expert not in hits))
    streamed: dict[int, int] = {}
    here = set(hits)

    def read_ahead() -> None:
        while to_read:
            expert = to_read[0]
            if slot_of[expert] >= 0:
                if fetcher.demand(moe_layer, expert, slot_of[expert]):
                    here.add(expert)
            else:
                block = fetcher.stream(moe_layer, expert)
                if block is None:
                    return
                streamed[expert] = block
            to_read.popleft()

    read_ahead()
    for expert in sorted(slot_of):
        while expert not in here:
            read = fetcher.arrival()
            here.add(read.expert)
            if read.expert not in streamed:
                fetcher.settle(read, slot_of[read.expert])
        block = streamed[expert] if expert in streamed else fetcher.block(slot_of[expert])
        (y_ND,) = experts_of_block(module, moe_layer, [block], [tokens.gather(expert)])
        tokens.add(out_TD, {expert: y_ND})
        if expert in streamed:
            fetcher.free_staging.append(block)
            read_ahead()
    return out_TD
