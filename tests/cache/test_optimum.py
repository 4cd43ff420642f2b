"""The optima against brute force: every choice of victims (and of misses left outside) is tried."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest

from swapless.cache.replay import replay
from tests.cache.made import made_trace


def best_hits(demands, capacity, *, bypass):
    """Most hits over all ways to serve ``demands`` (sets, judged at once and pinned) from an empty cache."""

    @cache
    def best(number, resident):
        if number == len(demands):
            return 0
        demand = frozenset(demands[number])
        hits, misses, idle = resident & demand, demand - resident, resident - demand
        result = -1
        for inserted in range(len(misses), -1, -1) if bypass else [len(misses)]:
            for new in combinations(sorted(misses), inserted):
                over = max(0, len(resident) + inserted - capacity)
                # Going more often than needed cannot help: what goes later can go then.
                for gone in combinations(sorted(idle), over):
                    result = max(result, best(number + 1, (resident - set(gone)) | set(new)))
        return result + len(hits)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("model", ["token", "single"])
def test_one_layer_is_exact(seed, model):
    trace = made_trace(tokens=14, layers=1, experts=6, top_k=2, seed=seed)
    rows = trace.expert_ids[:, 0].tolist()
    demands = [(expert,) for row in rows for expert in row] if model == "single" else [tuple(row) for row in rows]
    for capacity in (2, 3, 4):
        for name, bypass in (("belady", False), ("belady_bypass", True)):
            assert replay(trace, name, capacity, request_model=model).hits == best_hits(demands, capacity, bypass=bypass)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("model", ["token", "single"])
def test_a_shared_pool_is_exact(seed, model):
    trace = made_trace(tokens=8, layers=2, experts=4, top_k=2, seed=seed)
    sets = [tuple(4 * layer + expert for expert in row[layer]) for row in trace.expert_ids.tolist() for layer in range(2)]
    demands = [(key,) for demand in sets for key in demand] if model == "single" else sets
    for capacity in (2, 3, 5):
        for name, bypass in (("belady", False), ("belady_bypass", True)):
            found = replay(trace, name, capacity, pool="shared", request_model=model)
            assert found.hits == best_hits(demands, capacity, bypass=bypass)
