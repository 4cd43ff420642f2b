"""Gate look-ahead: the routers of the next MoE layers, asked with this layer's input.

The residual stream changes little from one block to the next, so a later router already sees most of what it will decide on.
It costs one small product a layer and needs no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from swapless.errors import UnsupportedOperationError, message
from swapless.runtime.ahead import Foreseen
from swapless.runtime.routers import near_experts
from swapless.runtime.routing import Step


class GateLookahead:
    """Foresees the experts of the MoE layers ``leads`` further on.

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
        self._routers: dict[int, tuple[torch.nn.Module, int, int]] = {}
        self._seen: dict[int, list[tuple[torch.nn.Module, torch.Tensor | None, tuple[Any, ...]]]] = {}
        self._hooks: dict[int, list[Any]] = {}
        for moe_layer, modules in enumerate(near):
            parts = modules[:-1]  # the block itself could not be asked without running its experts
            self._hooks[moe_layer] = [part.register_forward_hook(self._hook(moe_layer), with_kwargs=True) for part in parts]

    @property
    def routers(self) -> int:
        """MoE layers whose router can be asked, of those that have been called."""
        return len(self._routers)

    def _hook(self, moe_layer: int) -> Any:
        def remember(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, tuple):
                alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
                self._seen.setdefault(moe_layer, []).append((module, args[0] if alone else None, output))

        return remember

    def begin(self, step: Step) -> None:
        """The routers need to know nothing of it."""

    def seen(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """Learn which part of the block routed, the first time.

        Raises
        ------
        UnsupportedOperationError
            This family's router cannot be asked by itself, and must be.
        """
        if moe_layer not in self._hooks:
            return
        for module, given, output in reversed(self._seen.pop(moe_layer, [])):
            for place, part in enumerate(output):
                if isinstance(part, torch.Tensor) and part.data_ptr() == ids_TK.data_ptr() and given is not None:
                    self._routers[moe_layer] = module, place, given.dim()
                    self._unhook(moe_layer)
                    return
        if not self._required:
            self._unhook(moe_layer)
            return
        raise UnsupportedOperationError(
            message(
                "This family's router cannot be asked ahead: it is no part of its own that needs only the block's input.",
                where=f"MoE layer {moe_layer}",
                step="Load without prefetch.",
            )
        )

    def _unhook(self, moe_layer: int) -> None:
        for hook in self._hooks.pop(moe_layer):
            hook.remove()

    @torch.no_grad()
    def foresee(self, moe_layer: int, hidden_TD: torch.Tensor | None) -> Sequence[Foreseen]:
        """Experts of the later layers, those that most rows want first; before the first block there is nothing to ask with."""
        if hidden_TD is None:
            return []
        found = []
        for lead in self._leads:
            later = moe_layer + lead
            if later >= self._num_moe_layers or later not in self._routers:
                continue
            module, place, dim = self._routers[later]
            # Hooks belong to the model's own calls: this one is not the model's.
            ids = module.forward(hidden_TD if dim == 2 else hidden_TD[None])[place].reshape(-1)
            if len(hidden_TD) > 1:
                ids, uses = ids.unique(return_counts=True)
                ids = ids[uses.argsort(descending=True, stable=True)]
            found.append(Foreseen(later, ids.tolist(), len(ids)))
        return found
