"""How fast quantised experts are computed: weights a second, beside torch's own kernels and the memory's bandwidth.

    python benchmarks/expert_kernels.py                    # all cores
    python benchmarks/expert_kernels.py --tokens 1 --no-store

One decoded token meets ``--experts`` experts of ``--hidden`` x ``--inner`` (gate, up and down), drawn anew for every repeat
from a pool far larger than the processor's caches, as in a model. A row gives weights a second (the experts' parameters over
the time of all of them), the median and the quartiles of the repeats, and the bytes a second that this means. Rivals: torch
in bf16, torch's int8 (``_weight_int8pack_mm``) and int4 (``_weight_int4pack_mm_for_cpu``) products, on the same shapes. The
ceiling is the bandwidth of adding up a large array with the same threads. Outputs are compared with a dense product first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from results import deliver, document

from swapless.runtime.kernels import as_inputs, gated_product
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import dequantize, quantize
from swapless.store.read import aligned_buffer

POOL_BYTES = 2 << 30
"""Server processors have last caches of half a gigabyte; weights that stay in one are not a model's."""


class Experts:
    """A pool of quantised experts in one slab: the first is real, the others are copies of it in other places."""

    def __init__(self, hidden: int, inner: int, bits: int, group: int) -> None:
        self.into = MatrixLayout(rows=inner, columns=hidden, bits=bits, group=group)
        self.out = MatrixLayout(rows=hidden, columns=inner, bits=bits, group=group)
        self.block_bytes = 2 * self.into.nbytes + self.out.nbytes
        self.count = max(16, POOL_BYTES // self.block_bytes)
        self.slab = aligned_buffer(self.count * self.block_bytes)
        rng = np.random.default_rng(0)
        self.weights = []
        for layout, at in zip((self.into, self.into, self.out), (0, self.into.nbytes, 2 * self.into.nbytes)):
            matrix = rng.standard_normal((layout.rows, layout.columns)).astype(np.float32) / layout.columns**0.5
            memory = self.slab[at : at + layout.nbytes]
            quantize(matrix, layout, memory)
            self.weights.append(torch.from_numpy(dequantize(memory, layout).copy()))
        for expert in range(1, self.count):
            first = expert * self.block_bytes
            self.slab[first : first + self.block_bytes] = self.slab[: self.block_bytes]

    def run(self, x: torch.Tensor, chosen: list[int]) -> list[torch.Tensor]:
        """Outputs of the chosen experts, all for the same tokens."""
        base = [self.slab.ctypes.data + expert * self.block_bytes for expert in chosen]
        up = [address + self.into.nbytes for address in base]
        down = [address + 2 * self.into.nbytes for address in base]
        given = as_inputs([x] * len(chosen) if len(x) == 1 else [x.clone() for _ in chosen], self.into)
        return given.split(gated_product(self.into, base, up, self.out, down, given, "silu"))

    def check(self, x: torch.Tensor) -> float:
        """Largest difference from the dense product, relative to the largest output."""
        gate, up, down = self.weights
        expected = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        return float((self.run(x, [0])[0] - expected).abs().max() / expected.abs().max())


def torch_rivals(hidden: int, inner: int, count: int) -> dict[str, Callable[[torch.Tensor, list[int]], Any]]:
    """torch's own products on experts of the same shapes, by name."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    bf16 = [[torch.randn(shape, dtype=torch.bfloat16) * 0.02 for shape in shapes] for _ in range(max(16, count // 4))]
    int8 = [[torch.randint(-127, 127, shape, dtype=torch.int8) for shape in shapes] for _ in range(max(16, count // 2))]
    scales = [torch.full((shape[0],), 0.01, dtype=torch.bfloat16) for shape in shapes]

    def gated(products: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        return products[2](F.silu(products[0](x)) * products[1](x))

    def run_bf16(x: torch.Tensor, chosen: list[int]) -> None:
        for expert in chosen:
            weights = bf16[expert % len(bf16)]
            gated([lambda v, w=w: F.linear(v, w) for w in weights], x.bfloat16())

    def run_int8(x: torch.Tensor, chosen: list[int]) -> None:
        for expert in chosen:
            pairs = zip(int8[expert % len(int8)], scales)
            gated([lambda v, w=w, s=s: torch._weight_int8pack_mm(v, w, s) for w, s in pairs], x.bfloat16())

    def int4_of(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, shape, dtype=torch.int32), 1)
        return packed, torch.randn(shape[1] // 32, shape[0], 2, dtype=torch.bfloat16)

    int4 = [[int4_of(shape) for shape in shapes] for _ in range(16)]
    int4 += [[(w.clone(), s.clone()) for w, s in int4[i % 16]] for i in range(max(0, count - 16))]

    def run_int4(x: torch.Tensor, chosen: list[int]) -> None:
        for expert in chosen:
            pairs = int4[expert % len(int4)]
            gated([lambda v, w=w, s=s: torch._weight_int4pack_mm_for_cpu(v, w, 32, s) for w, s in pairs], x.bfloat16())

    return {"torch bf16": run_bf16, "torch int8": run_int8, "torch int4": run_int4}


def bandwidth() -> float:
    """Bytes a second of adding up an array of ``POOL_BYTES`` with torch's threads: the best of five."""
    array = torch.ones(POOL_BYTES // 4, dtype=torch.float32)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def timed(run: Callable[[torch.Tensor, list[int]], Any], x: torch.Tensor, draws: list[list[int]]) -> list[float]:
    """Seconds of each draw after two to warm up."""
    for chosen in draws[:2]:
        run(x, chosen)
    seconds = []
    for chosen in draws:
        start = time.perf_counter()
        run(x, chosen)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> int:
    """Measure, print a table on stderr and one JSON document on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--no-rivals", action="store_true", help="leave torch's own kernels out")
    parser.add_argument("--no-store", action="store_true", help="do not write a result file")
    options = parser.parse_args()
    weights = 3 * options.hidden * options.inner * options.experts
    rows: list[dict[str, Any]] = []
    ceiling = bandwidth()
    print(f"{torch.get_num_threads()} threads, memory {ceiling / 1e9:.1f} GB/s", file=sys.stderr)
    rng = np.random.default_rng(1)

    def measure(name: str, run: Any, count: int, bytes_a_weight: float, tokens: int, error: float | None = None) -> None:
        x = torch.randn(tokens, options.hidden)
        draws = [rng.permutation(count)[: options.experts].tolist() for _ in range(max(5, options.repeats // tokens))]
        seconds = timed(run, x, draws)
        median = statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4)
        row = {
            "kernel": name,
            "tokens": tokens,
            "weights_per_s": weights / median,
            "weights_per_s_quartiles": [weights / quartiles[2], weights / quartiles[0]],
            "bytes_per_s": weights * bytes_a_weight / median,
            "share_of_bandwidth": weights * bytes_a_weight / median / ceiling,
            "relative_error": error,
        }
        rows.append(row)
        print(
            f"{name:<22} {tokens:>4} tokens  {row['weights_per_s'] / 1e9:6.2f} Gweights/s "
            f"{row['bytes_per_s'] / 1e9:6.2f} GB/s  {100 * row['share_of_bandwidth']:5.1f} % of the memory's",
            file=sys.stderr,
        )

    with torch.no_grad():
        for bits, group in ((8, 32), (4, 32), (4, 64)):
            experts = Experts(options.hidden, options.inner, bits, group)
            name = f"int{bits}" + (f", groups of {group}" if bits == 4 else "")
            size = experts.block_bytes * options.experts / weights
            for tokens in options.tokens:
                error = experts.check(torch.randn(tokens, options.hidden))
                measure(name, experts.run, experts.count, size, tokens, error)
        if not options.no_rivals:
            count = 640
            for name, run in torch_rivals(options.hidden, options.inner, count).items():
                size = {"bf16": 2.0, "int8": 1.0, "int4": 0.625}[name.split()[1]]
                measure(name, run, count // {2.0: 4, 1.0: 2, 0.625: 1}[size], size, 1)
    config = {name: getattr(options, name) for name in ("hidden", "inner", "experts", "repeats")}
    result = document(
        "expert_kernels",
        config=config,
        measured={"threads": torch.get_num_threads(), "bandwidth_bytes_per_s": ceiling, "rows": rows},
    )
    deliver(result, stored=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
