"""What forward calls hold at once beside weights, KV cache and slots: tried out before anything is loaded.

The hollow model runs a prompt of the whole context, and shorter ones, and a decode step behind it; the kernel says what the
process held at the most. All that a real call allocates is allocated, but for what products hold inside, since linear layers
answer without one. Experts answer zeros of the sizes that theirs have, and as all tokens are alike, all choose the same
experts: the worst that a prompt can do. Layers that are like one before them only pass on what that one answered.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.errors import ContextError
from swapless.runtime.allocator import TooMuchError, give_back, most_memory, pages_of_their_own
from swapless.runtime.compute import accumulator, routed
from swapless.runtime.door import MoeLayer, experts_of, grow_in_place, most_heads
from swapless.runtime.dry import CacheSize, standing_in
from swapless.runtime.memory import Spike
from swapless.runtime.needs import Needs

_SHORTEST = 64
_STEP = 2
"""Prompts are tried of so many tokens, each this many times as long as the last, up to the context."""


class _StandIn:
    """Experts that answer zeros, and hold what ours hold on the way. Stands in for the engine at the door."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]) -> None:
        self._layers = {id(module): layer for (_, module), layer in zip(experts_of(model), layers, strict=True)}

    def forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        ids = ids_TK.numpy()
        tokens = routed(hidden_TD, ids, weights_TK)
        out_TD = accumulator(module, hidden_TD, weights_TK)
        inner = self._inner(module)
        for expert in np.unique(ids).tolist():
            tokens.add(out_TD, {expert: self._expert(module, inner, tokens.gather(expert))})
        return out_TD.to(hidden_TD.dtype)

    def _inner(self, module: Any) -> int:
        """Values between the products, for one token; 0 where kernels of ours take care of them, in scratch memory."""
        name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        for parameter in self._layers[id(module)].parameters:
            if parameter.name == name:
                return int(parameter.shape[-1] if module.is_transposed else parameter.shape[0])
        return 0

    @staticmethod
    def _expert(module: Any, inner: int, hidden_ND: torch.Tensor) -> torch.Tensor:
        def product(width: int) -> torch.Tensor:
            y = torch.zeros((len(hidden_ND), width), dtype=hidden_ND.dtype)
            return y + y[:1] if module.has_bias else y

        if inner:
            h = product(inner)
            h = module._apply_gate(h) if getattr(module, "has_gate", True) else module.act_fn(h)
        y = product(hidden_ND.shape[-1])
        return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def rehearse(
    model: PreTrainedModel, layers: Sequence[MoeLayer], cache: CacheSize, context_tokens: int, available_bytes: int
) -> Needs:
    """Try out a hollow model's forward calls.

    Parameters
    ----------
    model : PreTrainedModel
        From :func:`~swapless.runtime.hollow.hollow_model`, its experts nobody's yet. Left as it was.
    layers : sequence of MoeLayer
        What its experts are made of.
    cache : CacheSize
        From its :func:`~swapless.runtime.dry.dry_run`.
    context_tokens : int
        Longest prompt.
    available_bytes : int
        What the machine or a cgroup allows. What would not fit is not tried but foreseen, from shorter prompts.
    """
    with standing_in(model, _StandIn(model, layers)), most_heads(), _once_each(model) as begin:
        return _tried(model, begin, cache, context_tokens, available_bytes)


@torch.no_grad()
def _tried(model: Any, begin: Callable[[], None], cache: CacheSize, context_tokens: int, available_bytes: int) -> Needs:
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}

    def call(tokens: int, past: Any = None, **given: Any) -> tuple[int, Any]:
        ids = torch.zeros((1, tokens), dtype=torch.long)  # the one id that every vocabulary has
        for _ in range(_TRIES):
            out = None
            begin()
            give_back()
            with Spike() as spike:
                out = model(input_ids=ids, past_key_values=past, use_cache=True, **given)
            if spike.mapped_bytes < _GRAIN or past is not None:  # what is in a cache would be there twice
                break
        return -(-spike.nbytes // _GRAIN) * _GRAIN, getattr(out, "past_key_values", None)

    lengths = _lengths(context_tokens)
    torch.zeros(torch.get_num_threads() << 15, dtype=torch.uint8).add_(1)  # no thread could start for want of memory later
    gc.collect(0)
    pages_of_their_own(True)
    try:
        call(min(lengths[0], context_tokens), **last_only)  # the first call makes what others find
        prompts: list[tuple[int, int]] = []
        past, tried = None, True
        for tokens in lengths:
            past = None
            try:
                with most_memory(available_bytes if prompts else None):
                    nbytes, past = call(tokens, **last_only)
            except TooMuchError:
                nbytes, tried = _next(prompts, tokens), False
            prompts.append((tokens, max(nbytes, prompts[-1][1] if prompts else 0)))
        rows = min(context_tokens, _SHORTEST)
        vocabulary = model.config.get_text_config().vocab_size
        logits = 0
        if last_only:
            more = call(rows)[0] - call(rows, **last_only)[0]
            item = next(model.parameters()).dtype.itemsize
            logits = max(vocabulary * item, more // rows if more > 4 << 20 else 0)
        pages_of_their_own(False)
        grow_in_place(past)
        try:
            step = _step(call, past, last_only)
        except (ContextError, IndexError):  # a model that learned its positions has none behind the context
            _, past = call(max(1, context_tokens - _STEPS), **last_only)
            grow_in_place(past)
            step = _step(call, past, last_only)
    finally:
        pages_of_their_own(False)
        give_back()
    return Needs(tuple(prompts), step + _SAMPLING * vocabulary * 4, logits, cache, tried)


def _step(call: Callable[..., tuple[int, Any]], past: Any, given: dict[str, Any]) -> int:
    """What a decode step holds for a while."""
    return max(call(1, past, **given)[0] for _ in range(_STEPS)) if past is not None else call(1, **given)[0]


_TRIES = 3
"""How often a prompt is tried again because code was mapped on the way, which is no part of what it holds."""

_STEPS = 2
"""Decode steps that are tried: the first may make what later ones find."""

_GRAIN = 512 << 10
"""Figures are rounded up to whole ones of these, so that small things that come and go seldom show."""

_SAMPLING = 6
"""Copies of a step's logits in float32 that choosing a token holds at once: processors, sorting, probabilities."""


def _lengths(context_tokens: int) -> list[int]:
    lengths = [context_tokens]
    while lengths[0] > 4 * _SHORTEST:
        lengths.insert(0, -(-lengths[0] // _STEP))
    return [min(_SHORTEST, context_tokens), *lengths] if lengths[0] > _SHORTEST else lengths


def _next(prompts: list[tuple[int, int]], tokens: int) -> int:
    """What a longer prompt would hold if all grew as the square of its length."""
    last, nbytes = prompts[-1]
    return int(nbytes * (tokens / last) ** 2)


@contextmanager
def _once_each(model: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Of layers that are alike only the first one computes. Gives a function to be called before every forward call."""
    answers: dict[Any, Any] = {}
    kinds: set[Any] = set()
    layers = _decoder_layers(model)
    for layer in layers:
        kind = _kind(layer)
        layer.forward = _repeating(answers, kind) if kind in kinds else _noting(answers, kind, layer.forward)
        kinds.add(kind)
    try:
        yield answers.clear
    finally:
        for layer in layers:
            del layer.forward


def _noting(answers: dict[Any, Any], kind: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        answers.pop(kind, None)
        answers[kind] = own(*args, **kwargs)
        return answers[kind]

    return forward


def _repeating(answers: dict[Any, Any], kind: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answers[kind]


def _decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers that lie in one list with those that have experts."""
    lists: dict[str, Any] = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    found: dict[str, Any] = {}
    for path, _ in experts_of(model):
        parts = path.split(".")
        owner = next((name for n in range(1, len(parts)) if (name := ".".join(parts[:n])) in lists), None)
        if owner is not None:
            found[owner] = lists[owner]
    return [layer for layers in found.values() for layer in layers]


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Equal for layers that compute alike: classes, shapes and settings of all their parts, but for which one it is."""
    parts = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str)) and "idx" not in key and not key.startswith("swapless")
        )
        shapes = tuple((key, None if value is None else tuple(value.shape)) for key, value in module._parameters.items())
        buffers = tuple((key, None if value is None else tuple(value.shape)) for key, value in module._buffers.items())
        parts.append((name, type(module), settings, shapes, buffers))
    return tuple(parts)
