"""The published encoder, asked by loops of one order: the same bits on every machine, at a few times torch's time."""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.compiled import kernel
from swapless.portable import exp, exp32
from swapless.predict._network_kernels import add_products

_compiled: Any = kernel(error_model="numpy")


@_compiled
def product(rows: Any, weight: Any, bias: Any) -> Any:
    """``rows @ weight + bias``: (N, n), (n, m), (m,)."""
    out = np.empty((len(rows), len(bias)), np.float32)
    for row in range(len(rows)):
        out[row] = bias
    add_products(rows, weight, out)
    return out


@_compiled
def add_and_norm(x: Any, added: Any, gain: Any, bias: Any) -> None:
    """Layer norm of ``x + added``, both (N, D), into ``x``."""
    width = np.float32(x.shape[1])
    for row in range(len(x)):
        mean, spread = np.float32(0), np.float32(0)
        for d in range(x.shape[1]):
            x[row, d] += added[row, d]
            mean += x[row, d]
        mean /= width
        for d in range(x.shape[1]):
            spread += (x[row, d] - mean) * (x[row, d] - mean)
        root = np.sqrt(spread / width + np.float32(1e-5))
        for d in range(x.shape[1]):
            x[row, d] = (x[row, d] - mean) / root * gain[d] + bias[d]


@_compiled
def attention(x: Any, heads: int, into: Any, into_bias: Any, out: Any, out_bias: Any) -> Any:
    """Self-attention of all rows (N, D) to all rows."""
    rows, width = x.shape
    size = width // heads
    fed = product(x, into, into_bias)
    keys = np.ascontiguousarray(fed[:, width : 2 * width].T)
    mixed, weight, scale = np.zeros((rows, width), np.float32), np.empty(rows, np.float32), np.sqrt(np.float32(size))
    for row in range(rows):
        for head in range(heads):
            weight[:] = np.float32(0)
            for d in range(head * size, (head + 1) * size):
                factor, key = fed[row, d], keys[d]
                for other in range(rows):
                    weight[other] += factor * key[other]
            most, total = np.float32(-np.inf), np.float32(0)
            for other in range(rows):
                weight[other] /= scale
                most = max(most, weight[other])
            for other in range(rows):
                weight[other] = exp32(weight[other] - most)
                total += weight[other]
            for other in range(rows):
                share = weight[other] / total
                for d in range(head * size, (head + 1) * size):
                    mixed[row, d] += share * fed[other, 2 * width + d]
    return product(mixed, out, out_bias)


@_compiled
def relu(x: Any) -> None:
    """Negative values become 0, in place."""
    for row in range(len(x)):
        for d in range(x.shape[1]):
            x[row, d] = max(x[row, d], np.float32(0))


@_compiled
def gelu(x: Any) -> None:
    """``x`` times the normal distribution's share below it, in place."""
    for row in range(len(x)):
        for d in range(x.shape[1]):
            z = np.float64(x[row, d])
            # erf by its series in e^(-z^2): all terms have one sign, and beyond seven none is left
            share = 1.0 if z > 0 else 0.0
            if abs(z) < 7.0:
                half = z * z / 2
                term, total, odd = z, z, 3.0
                while abs(term) > 1e-17 * abs(total):
                    term *= 2 * half / odd
                    total += term
                    odd += 2.0
                share = 0.5 + total * exp(-half) / np.sqrt(2 * np.pi)
            x[row, d] = np.float32(z * share)
