"""A small Oracle-MoE with lively attention for every router, fitted to random themes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swapless.oracle import OracleMoeForCausalLM, of_size
from swapless.oracle.config import ROUTERS
from swapless.oracle.space import fit_space

END = 2
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "space_rank": 6,
    "initializer_range": 0.3,
    "eos_token_id": END,
}


def build(router: str, *, seed: int = 0, **changes) -> OracleMoeForCausalLM:
    torch.manual_seed(seed)
    model = OracleMoeForCausalLM(of_size("tiny", router=router, **SHAPE | changes)).eval()
    rng = np.random.default_rng(seed)
    for layer in model.routers:
        if layer.needs_fit:
            points = rng.normal(size=(400, SHAPE["hidden_size"])) * 0.4
            layer.put(1.0, fit_space(points, num_experts=8, rank=6, seed=seed))
        if hasattr(layer, "stay") and model.config.change_budget:
            layer.stay.fill_(0.5)
    return model


def text(seed: int, tokens: int, rows: int = 1) -> torch.Tensor:
    """Random tokens in which a document ends once in a while."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(3, SHAPE["vocab_size"], (rows, tokens)))
    ids[:, tokens // 3] = END
    return ids


FORGETS = "theme-gate, themes forget"


def built(name: str) -> OracleMoeForCausalLM:
    changes = {"theme_tokens": 6.0} if name == FORGETS else {}
    router = name.split(",")[0]
    return build(router, **changes | ({"change_budget": 0.2} if router == "theme-gate" else {}))


@pytest.fixture(params=sorted(ROUTERS))
def model(request) -> OracleMoeForCausalLM:
    return built(request.param)


@pytest.fixture(params=[*sorted(set(ROUTERS) - {"oracle-paper"}), FORGETS])
def causal_model(request) -> OracleMoeForCausalLM:
    return built(request.param)
