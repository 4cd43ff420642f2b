"""Eager attention of a long prompt some heads at a time.

transformers' eager attention holds scores of all heads at once, several times over: 16 heads and 8,192 tokens are 2 GiB in
bfloat16, and four of them are alive together. Heads have nothing to do with each other, so some are computed after others, by
the family's own function and with the same products, of the same shape: at one thread the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

PART_BYTES = 16 << 20
"""Scores that are computed at once, but for those of a single head."""

_EAGER = "eager_attention_forward"
_PER_HEAD = ("position_bias",)
"""Arguments (batch or 1, heads or 1, queries, keys) beside the mask."""

_whole: ContextVar[bool] = ContextVar("swapless_whole_attention", default=False)
_most: ContextVar[bool] = ContextVar("swapless_most_heads", default=False)


@contextmanager
def _on(switch: ContextVar[bool]) -> Iterator[None]:
    token = switch.set(True)
    try:
        yield
    finally:
        switch.reset(token)


def most_heads() -> AbstractContextManager[None]:
    """Parts are a little too large for as long as it is open, so that no shorter prompt's are larger."""
    return _on(_most)


def whole_attention() -> AbstractContextManager[None]:
    """All heads at once for as long as it is open: whoever wants the attention weights gets them."""
    return _on(_whole)


def part_heads(model: PreTrainedModel) -> None:
    """Have the attention modules of a built model compute some heads at a time, where they use transformers' eager function.

    Each gets a forward of its own that finds our function under that name; the class and its file stay as they are.
    """
    for module in model.modules():
        forward = type(module).forward
        eager = getattr(forward, "__globals__", {}).get(_EAGER)
        if not isinstance(forward, FunctionType) or eager is None or _EAGER not in forward.__code__.co_names:
            continue
        names = forward.__globals__ | {_EAGER: _in_parts(eager)}
        own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(own, module)


class _Heads:
    """An attention module as its eager function sees it, of which only some heads are there."""

    def __init__(self, module: Any, first: int, end: int, groups: int, per_head: tuple[str, ...]) -> None:
        self._module = module
        self.num_key_value_groups = groups
        for name in per_head:
            setattr(self, name, getattr(module, name)[first:end])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _in_parts(eager: Callable[..., Any]) -> Callable[..., Any]:
    names = set(eager.__code__.co_names)

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs (B, T, H, width) and weights, or None for them; queries (B, H, T, D), keys, values (B, groups, tokens, D)."""
        batch, heads, rows, _ = query.shape
        one = rows * key.shape[2] * query.element_size()
        per_head = tuple(name for name in module._parameters if name in names)
        if batch * heads * one <= PART_BYTES or rows == 1 or _whole.get() or not _parts(module, heads, per_head, kwargs):
            return eager(module, query, key, value, attention_mask, *args, **kwargs)
        together = heads // key.shape[1]
        more = _most.get()
        at_once = _together(max(1, -(-PART_BYTES // one) if more else PART_BYTES // one), together, more=more)
        out: torch.Tensor | None = None
        for sequence in range(batch):
            for first in range(0, heads, at_once):
                end = min(heads, first + at_once)
                groups = slice(first // together, -(-end // together))
                part = _Heads(module, first, end, min(together, at_once), per_head)
                given = {
                    name: _slice(argument, sequence, first, end) if name in _PER_HEAD else argument
                    for name, argument in kwargs.items()
                }
                of = slice(sequence, sequence + 1)
                y, _ = eager(
                    part,
                    query[of, first:end],
                    key[of, groups],
                    value[of, groups],
                    _slice(attention_mask, sequence, first, end),
                    *args,
                    **given,
                )
                if out is None:
                    out = y.new_empty((batch, rows, heads, y.shape[-1]))
                out[of, :, first:end] = y
        assert out is not None, "there is a head"
        return out, None

    return attend


def _parts(module: Any, heads: int, per_head: tuple[str, ...], kwargs: dict[str, Any]) -> bool:
    """Whether heads can be told apart in all that the function is given."""
    if kwargs.get("output_attentions"):
        return False
    if any(module._parameters[name] is None or module._parameters[name].shape[0] != heads for name in per_head):
        return False
    return not any(
        isinstance(argument, torch.Tensor) and argument.dim() > 3 and name not in _PER_HEAD for name, argument in kwargs.items()
    )


def _slice(argument: torch.Tensor | None, sequence: int, first: int, end: int) -> torch.Tensor | None:
    if argument is None:
        return None
    one = argument if argument.shape[0] == 1 else argument[sequence : sequence + 1]
    return one if one.shape[1] == 1 else one[:, first:end]


def _together(at_once: int, together: int, *, more: bool) -> int:
    """So many heads, or fewer, or ``more``: whole groups of those that share a key, or an equal part of one."""
    if at_once >= together:
        return -(-at_once // together) * together if more else at_once // together * together
    sizes = [size for size in range(1, together + 1) if together % size == 0]
    return min(size for size in sizes if size >= at_once) if more else max(size for size in sizes if size <= at_once)
