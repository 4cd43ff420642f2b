"""Kernels of the learned next use: sums of a ridge regression kept up token by token, solved by endless sweeps.

Every sum is taken in a fixed order in float32, so that replay, engine and the slow twin agree to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.cache.compiled import compiled_apart

# The faded blocks change slowly, so their products are taken every few tokens, a part of them each token.
STRIDE = 4
# Beyond this many tokens old ones weigh less: sums are halved, which also keeps float32 exact enough.
HALVED_AFTER = 131072
_PREFILL_EXPERTS = 8
# What has faded to less counts as nothing: processors take a hundred times as long over the tiniest of floats.
_FORGOTTEN = np.float32(1e-9)
FORGOTTEN_TOKENS = 100


@compiled_apart
def take_in(state: Any, moe_layer: int, experts: Any, fresh: bool, learn: bool) -> None:
    """One demand set: credit the uses that came, then feed in what was used. ``fresh``: the first one of its token."""
    fed, trail, cross, before = state.fed[moe_layer], state.trail[moe_layer], state.cross[moe_layer], state.before[moe_layer]
    num_experts, width = cross.shape
    horizon = state.horizon[0]
    if learn:
        now = state.learned[moe_layer]
        for i in range(len(experts)):
            expert = experts[i]
            # Faded sum of what went in since the expert's last use: the whole sum less what was there then.
            ago = now - state.used_at[moe_layer, expert]
            faded = state.powers[ago] if ago < state.powers.size else np.float32(0.0)
            credit, then = cross[expert], before[expert]
            for j in range(width):
                credit[j] += trail[j] - faded * then[j]
                then[j] = horizon * trail[j]
            state.used_at[moe_layer, expert] = now + 1
    one = np.float32(1.0)
    share = one if learn else min(one, np.float32(_PREFILL_EXPERTS) / np.float32(max(1, len(experts))))
    for block in range(state.fade.size):
        fade = state.fade[block]
        scale = np.sqrt(one - fade) * share
        base = block * num_experts
        if fresh:
            for j in range(base, base + num_experts):
                fed[j] = fed[j] * fade if fed[j] > _FORGOTTEN else np.float32(0.0)
        for i in range(len(experts)):
            fed[base + experts[i]] += scale
    fed[fed.size - 1] = one


@compiled_apart
def close(state: Any, moe_layer: int) -> None:
    """A decode token is over, all of its experts known: take it into the sums of the regression."""
    fed, trail = state.fed[moe_layer], state.trail[moe_layer]
    horizon = state.horizon[0]
    for j in range(fed.size):
        trail[j] = horizon * trail[j] + fed[j] if trail[j] > _FORGOTTEN else fed[j]
    state.learned[moe_layer] += 1
    _sum_products(state, moe_layer, state.value.shape[1])


@compiled_apart
def _sum_products(state: Any, moe_layer: int, num_experts: int) -> None:
    fed, moment, cross = state.fed[moe_layer], state.moment[moe_layer], state.cross[moe_layer]
    width = fed.size
    # Views that begin at the diagonal: loops from 0 are vectorised, loops from elsewhere are not.
    for i in range(num_experts):
        if fed[i] > np.float32(0.0):  # the experts of this token, each with 1
            row, other = moment[i, i:], fed[i:]
            for j in range(row.size):
                row[j] += other[j]
    for i in range(num_experts + state.learned[moe_layer] % STRIDE, width, STRIDE):
        scaled = np.float32(STRIDE) * fed[i]
        if scaled > np.float32(0.0):
            row, other = moment[i, i:], fed[i:]
            for j in range(row.size):
                row[j] += scaled * other[j]
    if state.learned[moe_layer] % HALVED_AFTER == 0:
        half = np.float32(0.5)
        for i in range(width):
            for j in range(width):
                moment[i, j] *= half
        for i in range(num_experts):
            for j in range(width):
                cross[i, j] *= half


@compiled_apart
def sweep(state: Any, moe_layer: int) -> None:
    """Solve the regression for one more row of the map, the others as they are."""
    moment, cross, weight = state.moment[moe_layer], state.cross[moe_layer], state.weight[moe_layer]
    num_experts, width = cross.shape
    row = state.row[moe_layer]
    state.row[moe_layer] = row + 1 if row + 1 < width else 0
    ridge = state.ridge[0]
    solved = state.value[moe_layer]  # room; values are predicted afresh after every sweep
    for expert in range(num_experts):
        solved[expert] = cross[expert, row]
    if row < width - 1:
        solved[row % num_experts] += ridge * state.prior[row // num_experts]
    for j in range(width):
        if j != row:
            factor = moment[row, j] if j > row else moment[j, row]  # only one half of it is kept
            other = weight[j]
            for expert in range(num_experts):
                solved[expert] -= factor * other[expert]
    scale = np.float32(1.0) / (moment[row, row] + ridge)
    for expert in range(num_experts):
        weight[row, expert] = solved[expert] * scale


@compiled_apart
def predict(state: Any, moe_layer: int) -> None:
    """Value of every expert of the MoE layer, from what was fed in up to now."""
    fed, weight, value = state.fed[moe_layer], state.weight[moe_layer], state.value[moe_layer]
    for expert in range(value.size):
        value[expert] = np.float32(0.0)
    for j in range(fed.size):
        factor = fed[j]
        if factor != np.float32(0.0):
            row = weight[j]
            for expert in range(value.size):
                value[expert] += factor * row[expert]


@compiled_apart
def begin_token(state: Any, moe_layer: int, token: int, decode: bool) -> None:
    """The first demand set of a token is here: learn from the one before, whose experts are all known now."""
    if state.open[moe_layer]:
        close(state, moe_layer)
        # A row costs E * F; with many experts a row every few tokens keeps a block within its microseconds.
        if state.learned[moe_layer] % (1 + state.value.shape[1] // 128) == 0:
            for _ in range(state.parts[moe_layer]):
                sweep(state, moe_layer)
            state.valued_at[moe_layer] = -1
    if state.parts[moe_layer] > 1 and state.valued_at[moe_layer] < 0:  # the last ones with a whole token before them
        predict(state, moe_layer)
        state.valued_at[moe_layer] = 0
    state.seen[moe_layer] = token
    state.open[moe_layer] = decode
    state.last_parts[moe_layer] = state.parts[moe_layer]
    state.parts[moe_layer] = 0


@compiled_apart
def value_part(state: Any, moe_layer: int, experts: Any) -> None:
    """Value what is known of a token whose requests come one at a time, while more of it is due.

    Half a token tells less than the whole one before it, so values stay those that were predicted then, but for the experts
    that it has asked for.
    """
    fed, weight = state.fed[moe_layer], state.weight[moe_layer]
    for i in range(len(experts)):
        value = np.float32(0.0)
        for j in range(fed.size):
            value += fed[j] * weight[j, experts[i]]
        state.value[moe_layer, experts[i]] = value
