"""What a forward call holds at once beside weights, KV cache and slots, by how many tokens it has and how many are before."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import torch

from swapless.runtime.dry import CacheSize


class Call(NamedTuple):
    """A forward call: sequences, new tokens of each, tokens of each in the cache, and rows of logits it gives out of each."""

    batch: int
    new: int
    past: int
    logits_rows: int
    extra_bytes: int = 0


class Needs(NamedTuple):
    """What was found out about a model, in bytes.

    ``prompts`` are (tokens, bytes) of prompts of one sequence with an empty cache, rising, the last of the whole context;
    ``step_bytes`` a decode step behind a whole context; ``logits_row_bytes`` a row of logits beyond the last.
    ``cache`` is what the KV cache takes. ``tried`` says that no length had to be foreseen for want of memory.
    """

    prompts: tuple[tuple[int, int], ...]
    step_bytes: int
    logits_row_bytes: int
    cache: CacheSize
    tried: bool = True

    @property
    def prompt_bytes(self) -> int:
        """Of a prompt of the whole context, of which only the last token's logits are wanted."""
        tokens, nbytes = self.prompts[-1]
        return nbytes + self.cache.whole(tokens)

    def cached(self, call: Call) -> int:
        """What the KV cache holds after ``call``."""
        return call.batch * self.cache.of(call.past + call.new)

    def new_in_cache(self, call: Call) -> int:
        """By how much the KV cache grows in ``call``."""
        return self.cached(call) - (call.batch * self.cache.of(call.past) if call.past else 0)

    def of(self, call: Call) -> int:
        """What ``call`` holds at the most, or a little more.

        Between two lengths that were tried it is a straight line, which is above what grows ever faster. New tokens behind
        others hold what a decode step holds, and of what a prompt as long as both holds their own share. A batch holds no
        more than its sequences one after the other.
        """
        tokens = call.past + call.new
        if call.new == 1:
            nbytes = call.batch * self.step_bytes
        elif call.past == 0:
            nbytes = call.batch * self._prompt(call.new)
            if call.batch * call.new <= self.prompts[-1][0]:
                nbytes = min(nbytes, self._prompt(call.batch * call.new))
        else:
            shortest = self.prompts[0][0]
            share = min(1.0, max(call.new, shortest) / tokens)
            nbytes = call.batch * (self.step_bytes + int(share * self._prompt(tokens)))
        if call.new > 1:
            nbytes += call.batch * self.cache.whole(tokens)
        return nbytes + call.batch * max(0, call.logits_rows - 1) * self.logits_row_bytes + call.extra_bytes

    def _prompt(self, tokens: int) -> int:
        lengths = [length for length, _ in self.prompts]
        at = bisect_left(lengths, tokens)
        if at == len(lengths):
            length, nbytes = self.prompts[-1]
            return int(nbytes * (tokens / length) ** 2)
        if at == 0:
            return self.prompts[0][1]
        (low, less), (high, more) = self.prompts[at - 1], self.prompts[at]
        return less + (more - less) * (tokens - low) // (high - low)


def call_of(given: dict[str, Any], config: Any, batch: int, new: int, past: int) -> Call:
    """The sizes of a forward call.

    Parameters
    ----------
    given : dict
        Its arguments by name.
    config : PreTrainedConfig
        Of the model's text.
    batch, new, past : int
        Sequences, new tokens of each, and tokens of each in the cache.
    """
    keep = given.get("logits_to_keep", 0)
    rows = keep.numel() if isinstance(keep, torch.Tensor) else min(new, int(keep or new))
    extra = 0
    if given.get("labels") is not None:  # the logits in float32, shifted, and their logarithms
        extra += 3 * 4 * batch * new * int(config.vocab_size)
    asked = {name: given.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")}
    layers = int(getattr(config, "num_hidden_layers", 1))
    if asked["output_hidden_states"]:
        extra += 4 * batch * new * int(config.hidden_size) * (layers + 1)
    if asked["output_attentions"]:
        extra += 4 * batch * new * (past + new) * int(getattr(config, "num_attention_heads", 1)) * (layers + 2)
    return Call(batch, new, past, rows, extra)
