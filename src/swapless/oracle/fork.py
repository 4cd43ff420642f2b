"""From the warm-up's weights to the model to be: copy what is the same, make experts out of what is there.

A dense warm-up gives every expert a copy of its feed-forward, so that the loss does not jump; a warm-up with a learned gate
gives its experts to the regions where their tokens went. The same copying carries the optimiser's moments over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from swapless.errors import UsageError, message
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.fit import RouterFit
from swapless.oracle.model import OracleMoeForCausalLM

__all__ = ["Carry", "fork", "match_experts"]

Carry = Callable[[Mapping[str, Tensor], str], Tensor | None]
"""From tensors by their old names and a new name to the tensor of that name; None where it begins anew."""

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def fork(
    model: OracleMoeForCausalLM, config: OracleMoeConfig, fits: Sequence[RouterFit] | None, order: Sequence[np.ndarray] | None
) -> tuple[OracleMoeForCausalLM, Carry]:
    """The model of ``config`` that goes on where ``model`` stands.

    Parameters
    ----------
    model : OracleMoeForCausalLM
        The warm-up: the router ``dense``, or a learned gate with experts of the same number.
    config : OracleMoeConfig
        The model to be.
    fits : sequence of RouterFit, optional
        For routers that are fitted.
    order : sequence of int ndarray (E,), optional
        For a warm-up with experts: which old expert each new one takes over, a MoE layer each; without it, its own.

    Returns
    -------
    (OracleMoeForCausalLM, Carry)
        The new model in float32, and how to carry other tensors (moments) over.

    Raises
    ------
    UsageError
        Models of different shapes, or experts in other places.
    """
    old = model.config
    wrong = [name for name in _SHAPE if getattr(old, name) != getattr(config, name)]
    if old.router != "dense" and config.router != "dense":
        wrong += [name for name in ("moe_blocks", "num_experts") if getattr(old, name) != getattr(config, name)]
    if wrong or (config.router == "dense" and old.router != "dense"):
        raise UsageError(message("The warm-up does not fit the model to be.", got=", ".join(wrong) or f"router {old.router!r}"))
    new = OracleMoeForCausalLM(config)
    blocks = config.moe_blocks or []

    def carry(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if block not in blocks or ".mlp." not in name:
            return tensors.get(name)
        head, _, part = name.partition(".mlp.")
        if part.startswith("router."):
            return tensors.get(name) if old.router == config.router else None
        stacked = tensors.get(name)
        if stacked is not None:
            return stacked if order is None else stacked[torch.from_numpy(order[blocks.index(block)])]
        kind = part.removeprefix("experts.")
        source = f"{kind.removesuffix('_bias')}.{'bias' if kind.endswith('_bias') else 'weight'}"
        one = tensors.get(f"{head}.mlp.{source}")
        return None if one is None else one.unsqueeze(0).expand(config.num_experts, *one.shape)

    tensors = model.state_dict()
    with torch.no_grad():
        for name, tensor in new.state_dict().items():
            carried = carry(tensors, name)
            if carried is not None:
                tensor.copy_(carried)
    for router, found in zip(new.routers, fits or [], strict=bool(fits)):
        if router.needs_fit and found.space is not None:
            router.put(found.tau, found.space)
    return new, carry


@torch.no_grad()
def match_experts(old: OracleMoeForCausalLM, new: OracleMoeForCausalLM, batches: Sequence[Tensor]) -> list[np.ndarray]:
    """For each MoE layer, the old expert that best fits each new region: most common tokens, each expert once.

    ``new`` must be a fork of ``old`` without an order. The paper does not describe its map; ours is the assignment problem on
    counts of tokens.
    """
    from scipy.optimize import linear_sum_assignment

    E = new.config.num_experts
    counts = [np.zeros((E, E)) for _ in new.routers]
    old.eval(), new.eval()
    for ids_BT in batches:
        before, after = (model.model(ids_BT, use_cache=False).expert_ids for model in (old, new))
        for count, old_TK, new_TK in zip(counts, before, after, strict=True):
            np.add.at(count, (new_TK[:, 0].cpu().numpy(), old_TK[:, 0].cpu().numpy()), 1)
    return [linear_sum_assignment(-count)[1] for count in counts]
