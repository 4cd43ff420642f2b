"""The router's output for every expert, losers too: found beside the experts by what it returns, never by name.

Every family at the door has a router that returns (logits, weights, ids), and its ids are the very tensor that the experts
module is called with; that is how a block's router is told from the block's other parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.errors import TraceValueError, message
from swapless.runtime.door import experts_of


def near_experts(model: PreTrainedModel) -> list[list[torch.nn.Module]]:
    """Of each MoE layer, all that stands in the same block as its experts module, the block itself last."""
    modules = dict(model.named_modules())
    near = []
    for path, experts in experts_of(model):
        block = path.rpartition(".")[0]
        near.append([module for name, module in modules.items() if name.startswith(f"{block}.") and module is not experts])
        near[-1].append(modules[block])
    return near


class RouterTap:
    """Remembers the last output of every part that stands near an experts module, without changing any.

    Parameters
    ----------
    model : PreTrainedModel
        A loaded model; hooks stay on it until :meth:`remove`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._latest: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self._handles = []
        for moe_layer, modules in enumerate(near_experts(model)):
            self._handles += [module.register_forward_hook(self._hook(moe_layer)) for module in modules]

    def _hook(self, moe_layer: int) -> Any:
        def remember(module: torch.nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) >= 3 and all(isinstance(part, torch.Tensor) for part in output[:3]):
                self._latest.setdefault(moe_layer, []).append(output)

        return remember

    def scores(self, moe_layer: int, ids_TK: torch.Tensor, num_experts: int) -> np.ndarray:
        """Router output of the block that is now calling its experts with ``ids_TK``: float16 (T, E).

        Raises
        ------
        TraceValueError
            No part of the block returned these ids: this family's router does not show its scores.
        """
        for logits, *rest in reversed(self._latest.pop(moe_layer, [])):
            if any(isinstance(part, torch.Tensor) and part.data_ptr() == ids_TK.data_ptr() for part in rest):
                scores = logits.detach().reshape(len(ids_TK), -1)[:, :num_experts].float()
                limit = torch.finfo(torch.float16).max
                return scores.clamp(-limit, limit).numpy().astype(np.float16)
        raise TraceValueError(
            message(
                "This family's router does not show its scores.",
                where=f"MoE layer {moe_layer}",
                step="Record without --scores.",
            )
        )

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
