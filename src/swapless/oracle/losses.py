"""What training adds to the language loss: a balance term for learned gates, and the penalty of the sticky router."""

from __future__ import annotations

import torch
from torch import Tensor

from swapless.oracle.model import OracleMoeForCausalLM, OracleMoeOutput

__all__ = ["balance_loss", "router_losses", "sticky_loss"]


def balance_loss(scores_TE: Tensor, load_E: Tensor, real_T: Tensor) -> Tensor:
    """E * sum(load * mean probability): 1 when balanced.

    ``load_E`` runs over many steps. Over one batch a router that keeps a text on one expert looks unbalanced however evenly it
    uses them all, and would be punished for the very thing it is for.

    References
    ----------
    .. [1] Fedus et al., "Switch Transformers", JMLR 2022, equation 4; there over one batch.
    """
    share_E = scores_TE.softmax(dim=-1)[real_T].mean(dim=0)
    return len(load_E) * (load_E.to(share_E) * share_E).sum()


def sticky_loss(scores_TE: Tensor, restart_T: Tensor) -> Tensor:
    """Mean squared step of the gate's probabilities from one token to the next within a document.

    References
    ----------
    .. [1] "StickyMoE", arXiv:2607.08780.
    """
    share_TE = scores_TE.softmax(dim=-1)
    steps_TE = (share_TE[1:] - share_TE[:-1])[restart_T[1:] == 0]
    return steps_TE.square().sum(dim=-1).mean()


def router_losses(model: OracleMoeForCausalLM, out: OracleMoeOutput, balance: float) -> Tensor:
    """Sum of the terms that the model's routers ask for, weighted; 0 for routers that do not learn.

    Parameters
    ----------
    model : OracleMoeForCausalLM
        Whose gates' running loads are read.
    out : OracleMoeOutput
        Of the same forward call.
    balance : float
        Weight of the balance term, mean over MoE layers.
    """
    assert out.restarts is not None, "an output of the model's own forward has them"
    total = torch.zeros((), device=model.device)
    if not model.routers or model.config.kind.choice != "gate" or out.router_logits is None:
        return total
    restart_T = out.restarts.to(total.device)
    for router, scores_TE in zip(model.routers, out.router_logits, strict=True):
        total = total + balance / len(model.routers) * balance_loss(scores_TE, router.load, restart_T >= 0)
        if model.config.router == "sticky":
            total = total + model.config.sticky_weight / len(model.routers) * sticky_loss(scores_TE, restart_T)
    return total
