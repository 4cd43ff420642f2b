"""Gate look-ahead: the routers of the next MoE layers, asked with this layer's input.

The residual stream changes little from one block to the next, so a later router already sees most of what it will decide on.
It costs one small product a layer and needs no training. Before the first MoE layer there is nothing to ask with: of it is
foreseen what the same token chose there the last time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.errors import UnsupportedOperationError, message
from swapless.runtime.ahead import Foreseen
from swapless.runtime.routers import near_experts
from swapless.runtime.routing import Step


class _Router(NamedTuple):
    """A module that routes: dimensions of its input, what else it is always given, and where in its output the ids are."""

    module: torch.nn.Module
    dim: int
    rest: tuple[torch.Tensor | None, ...]
    place: int = 0

    def ids(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        # Hooks belong to the model's own calls: this one is not the model's.
        ids: torch.Tensor = self.module.forward(hidden_TD if self.dim == 2 else hidden_TD[None], *self.rest)[self.place]
        return ids


class LastChoice:
    """What each token chose last, of a bounded number of tokens: those not seen for longest are forgotten."""

    MOST_TOKENS = 4096

    def __init__(self) -> None:
        self._chosen: OrderedDict[int, bytes] = OrderedDict()

    def note(self, tokens: np.ndarray, ids_TK: np.ndarray) -> None:
        """``tokens`` (T,) chose ``ids_TK`` (T, K)."""
        rows = ids_TK[-self.MOST_TOKENS :].astype(np.int16)
        for token, row in zip(tokens[-self.MOST_TOKENS :].tolist(), rows, strict=True):
            self._chosen[token] = row.tobytes()
            self._chosen.move_to_end(token)
        while len(self._chosen) > self.MOST_TOKENS:
            self._chosen.popitem(last=False)

    def of(self, tokens: np.ndarray) -> list[int]:
        """Experts of ``tokens`` the last time, those of most of them first."""
        known = [np.frombuffer(self._chosen[token], np.int16) for token in tokens.tolist() if token in self._chosen]
        if len(known) <= 1:
            return known[0].tolist() if known else []
        experts, uses = np.unique(np.concatenate(known), return_counts=True)
        return [int(expert) for expert in experts[np.argsort(-uses, kind="stable")]]


class GateLookahead:
    """Foresees the experts of the MoE layers ``leads`` further on, and of the first one at the beginning of a step.

    A router is known by what it returns: the very ids that the experts are then called with. So the first forward call,
    which is prefill, shows each layer's router, and from then on it can be asked.

    Parameters
    ----------
    model : PreTrainedModel
        A loaded model.
    leads : sequence of int
        How many MoE layers ahead, each at least 1.
    required : bool
        Whether a router that cannot be asked by itself is an error; else nothing is foreseen of its MoE layer.
    """

    def __init__(self, model: PreTrainedModel, leads: Sequence[int] = (1,), *, required: bool = True) -> None:
        self._leads = sorted(leads)
        self._required = required
        near = near_experts(model)
        self._num_moe_layers = len(near)
        self._last = LastChoice()
        self._tokens: np.ndarray | None = None
        self._routers: dict[int, _Router] = {}
        self._seen: dict[int, list[tuple[_Router | None, tuple[Any, ...]]]] = {}
        self._hooks: dict[int, list[Any]] = {}
        for moe_layer, modules in enumerate(near):
            *parts, block = modules  # the block itself could not be asked without running its experts
            hook = self._hook(moe_layer, [*block.parameters(), *block.buffers()])
            self._hooks[moe_layer] = [part.register_forward_hook(hook, with_kwargs=True) for part in parts]

    @property
    def routers(self) -> int:
        """MoE layers whose router can be asked, of those that have been called."""
        return len(self._routers)

    def _hook(self, moe_layer: int, own: list[torch.Tensor]) -> Any:
        def always(value: Any) -> bool:
            return value is None or any(value is tensor for tensor in own)

        def remember(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, tuple):
                hidden, *rest = args or (None,)
                asked = isinstance(hidden, torch.Tensor) and all(map(always, rest)) and not kwargs
                router = _Router(module, hidden.dim(), tuple(rest)) if asked else None
                self._seen.setdefault(moe_layer, []).append((router, output))

        return remember

    def begin(self, step: Step) -> None:
        """Only the first MoE layer is foreseen by the tokens; the routers need to know nothing of them."""
        self._tokens = step.token_id

    def seen(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """Learn which part of the block routed, the first time, and what the tokens chose in the first MoE layer.

        Raises
        ------
        UnsupportedOperationError
            This family's router cannot be asked by itself, and must be.
        """
        if moe_layer == 0 and self._tokens is not None and len(self._tokens) == len(ids_TK):
            self._last.note(self._tokens, ids_TK.numpy())
        if moe_layer not in self._hooks:
            return
        for router, output in reversed(self._seen.pop(moe_layer, [])):
            for place, part in enumerate(output):
                if isinstance(part, torch.Tensor) and part.data_ptr() == ids_TK.data_ptr() and router is not None:
                    self._routers[moe_layer] = router._replace(place=place)
                    self._unhook(moe_layer)
                    return
        if not self._required:
            self._unhook(moe_layer)
            return
        raise UnsupportedOperationError(
            message(
                "This family's router cannot be asked ahead: it is no part that needs only the block's input and weights.",
                where=f"MoE layer {moe_layer}",
                step="Load without prefetch.",
            )
        )

    def _unhook(self, moe_layer: int) -> None:
        for hook in self._hooks.pop(moe_layer):
            hook.remove()

    @torch.no_grad()
    def foresee(self, moe_layer: int, hidden_TD: torch.Tensor | None) -> Sequence[Foreseen]:
        """Experts of the later layers, those that most rows want first; before the first of them, as the tokens chose last."""
        if hidden_TD is None:
            experts = self._last.of(self._tokens) if self._routers and self._tokens is not None else []
            return [Foreseen(0, experts, len(experts))] if experts else []
        found = []
        for lead in self._leads:
            later = moe_layer + lead
            if later >= self._num_moe_layers or later not in self._routers:
                continue
            ids = self._routers[later].ids(hidden_TD).reshape(-1)
            if len(hidden_TD) > 1:
                ids, uses = ids.unique(return_counts=True)
                ids = ids[uses.argsort(descending=True, stable=True)]
            found.append(Foreseen(later, ids.tolist(), len(ids)))
        return found
