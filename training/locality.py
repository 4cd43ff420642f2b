"""Two measures of routing that are watched while training: how evenly experts are used, and how often a small cache would hit.

They are small twins of what `swapless.locality` and `swapless.cache` do with a recorded trace, kept here so that training
needs no trace file.
"""

from __future__ import annotations

import numpy as np

from swapless.compiled import kernel


def load_entropy(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Entropy of each MoE layer's expert load over log E, shape (L,); `expert_ids` is (T, L, K)."""
    entropies = []
    for moe_layer in range(expert_ids.shape[1]):
        load = np.bincount(expert_ids[:, moe_layer].ravel(), minlength=num_experts) / expert_ids[:, moe_layer].size
        used = load[load > 0]
        entropies.append(-(used * np.log(used)).sum() / np.log(num_experts))
    return np.array(entropies)


@kernel()
def _lru_hits(ids_TLK: np.ndarray, num_experts: int, capacity: int) -> np.ndarray:
    T, L, K = ids_TLK.shape
    hits = np.zeros(L, np.int64)
    for moe_layer in range(L):
        used_at = np.full(num_experts, -1, np.int64)
        resident = np.zeros(num_experts, np.bool_)
        residents = 0
        for t in range(T):
            for k in range(K):
                if resident[ids_TLK[t, moe_layer, k]]:
                    hits[moe_layer] += 1
                used_at[ids_TLK[t, moe_layer, k]] = t
            for k in range(K):
                expert = ids_TLK[t, moe_layer, k]
                if resident[expert]:
                    continue
                if residents == capacity:
                    victim = -1
                    for other in range(num_experts):
                        # this token's experts carry used_at == t: pinned
                        if resident[other] and used_at[other] < t and (victim < 0 or used_at[other] < used_at[victim]):
                            victim = other
                    resident[victim] = False
                    residents -= 1
                resident[expert] = True
                residents += 1
    return hits


def lru_hit_rate(expert_ids: np.ndarray, num_experts: int, capacity_experts: int) -> np.ndarray:
    """Hit rate of an LRU cache of `capacity_experts` in each MoE layer, shape (L,).

    All K experts of a token are judged on the state before the token and pinned while it runs; the cache starts cold
    and is never emptied.
    """
    T, _, K = expert_ids.shape
    if not K <= capacity_experts <= num_experts:
        raise ValueError(f"capacity_experts must be in [{K}, {num_experts}] (K and E). Got {capacity_experts}.")
    return _lru_hits(np.ascontiguousarray(expert_ids, np.int64), num_experts, capacity_experts) / (T * K)


def shuffled_tokens(expert_ids: np.ndarray, seed: int) -> np.ndarray:
    """The same trace with its tokens in random order: same load of every expert, no locality in time."""
    return expert_ids[np.random.default_rng(seed).permutation(len(expert_ids))]
