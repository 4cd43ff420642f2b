"""Time of products of one token with weights that no processor cache holds: by the engine's own experts and linear layers.

Weights are random, since their values do not matter; shapes and kernels are those of the model that is asked about.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from swapless.plan.hollow import Linear, Times
from swapless.runtime.memory import available_bytes
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import computation
from swapless.runtime.pool import SlotPool, slot_bytes
from swapless.store.matrix import GROUPS, ROW_BLOCK, MatrixLayout
from swapless.store.packed import Manifest, PackedLayer
from swapless.store.read import aligned_buffer

_LEAST_COLD_BYTES = 96 << 20
_MOST_COLD_BYTES = 1 << 30
_MOST_LINEARS = 512
"""Copies of one linear layer: more take longer to make than they are worth."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_MOST_BYTES = 48 << 20
"""A larger matrix is cut into parts of so many, for there must be several of each."""

_REPEATS = 7
_LEAST_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTime:
    """Seconds of one expert for one token: ``together`` with the others of its token in one call (``least`` is the fastest of
    the calls), or ``alone``.
    """

    together_s: float
    least_s: float
    alone_s: float


def cold_bytes(caches: Path = _CACHES) -> int:
    """Weights are drawn in turn from so many bytes: half as many again as the last cache holds, which others may share.

    Server processors have caches of hundreds of megabytes, and weights timed in them are twice as fast as a model's. Bounded by
    a quarter of the memory that is free. ``caches`` is where the kernel describes them; where it does not, a size that is more
    than most processors have.
    """
    sizes = [file.read_text().strip() for file in caches.glob("index*/size")]
    last = max((int(size[:-1]) << 10 for size in sizes if size.endswith("K") and size[:-1].isdecimal()), default=0)
    return max(_LEAST_COLD_BYTES, min(last * 3 // 2, _MOST_COLD_BYTES, available_bytes() // 4))


InPlace = Callable[[Callable[..., Any]], Times]
"""Seconds a decode step spends in a computation of experts: :meth:`~swapless.plan.hollow.HollowRun.experts_s`."""


class ColdExperts:
    """Slots full of experts of ``opened`` with random weights, more than any cache holds, and how they are computed.

    Parameters
    ----------
    opened : OpenCheckpoint
        Says what an expert is made of; none of it is read.

    Attributes
    ----------
    pool : SlotPool
        The slots.
    compute : Experts
        Computes them, as the engine does, at torch's present number of threads.
    """

    def __init__(self, opened: OpenCheckpoint) -> None:
        layers = opened.layout.moe_layers
        self.opened = opened
        self.pool = SlotPool(layers, max(2, -(-cold_bytes() // slot_bytes(layers))))
        _fill(self.pool, opened)
        self.compute = computation(opened).of(self.pool)

    def __enter__(self) -> ColdExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()


def expert_time(cold: ColdExperts, module: Any, in_place: InPlace | None = None) -> ExpertTime:
    """Time ``cold`` experts.

    Parameters
    ----------
    cold : ColdExperts
        The experts.
    module : torch.nn.Module
        An experts module of its model, for gate and activation; without weights.
    in_place : callable, optional
        Times them in the course of a token. Without it they are called again and again, which is faster: torch's threads are
        awake then, and the code is in the caches.
    """
    opened, layers = cold.opened, len(cold.opened.layout.moe_layers)
    top_k = max(1, opened.experts_a_token // layers)
    hidden = torch.randn(1, _hidden_size(opened), dtype=torch.float32).to(opened.layout.dtype)
    slots = itertools.cycle(range(cold.pool.slots))

    def call(count: int) -> None:
        cold.compute(module, 0, [next(slots) for _ in range(count)], [hidden] * count)

    def elsewhere(module: Any, moe_layer: int, blocks: Sequence[int], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return cold.compute(module, 0, [next(slots) for _ in blocks], inputs)

    with torch.inference_mode():
        together = alone = _median_s(lambda: call(1))
        if top_k > 1:
            together = _median_s(lambda: call(top_k)) / top_k
        if in_place is None:
            return ExpertTime(together_s=together, least_s=together, alone_s=alone)
        usual, least = (seconds / layers / top_k for seconds in in_place(elsewhere))
        return ExpertTime(together_s=usual, least_s=least, alone_s=alone * usual / together)


def linear_products(opened: OpenCheckpoint, called: Mapping[Linear, int]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Linear layers of one token in the precision that ``opened`` keeps them in, by their paths, with random weights.

    ``called`` says which there are and how often a token passes them (:class:`~swapless.plan.hollow.HollowRun`). Layers of one
    shape take turns with so many copies that no cache holds all that a token passes.
    """
    manifest, dtype = opened.manifest, opened.layout.dtype
    layouts = {} if manifest is None else manifest.linear_layouts
    kinds: dict[Linear, list[_Kind]] = {}
    passed: Counter[_Kind] = Counter()
    for linear, times in called.items():
        kinds[linear] = _Kind(linear.inputs, linear.outputs, linear.bias, dtype, layouts.get(linear.path)).parts()
        for kind in kinds[linear]:
            passed[kind] += times
    total = sum(times * kind.nbytes for kind, times in passed.items())
    share = min(1.0, cold_bytes() / max(1, total))
    turns = {
        kind: itertools.cycle([_linear(kind) for _ in range(min(_MOST_LINEARS, max(1, round(share * times))))])
        for kind, times in passed.items()
    }

    def product(kinds: list[_Kind]) -> Callable[[torch.Tensor], torch.Tensor]:
        if len(kinds) == 1:
            return lambda x: next(turns[kinds[0]])(x.to(dtype))
        return lambda x: torch.cat([next(turns[kind])(x.to(dtype)) for kind in kinds], dim=-1)

    return {linear.path: product(parts) for linear, parts in kinds.items()}


class _Kind(NamedTuple):
    """Linear layers of one shape and precision; ``layout`` where they are rounded."""

    inputs: int
    rows: int
    bias: bool
    dtype: torch.dtype
    layout: MatrixLayout | None

    @property
    def nbytes(self) -> int:
        return self.inputs * self.rows * self.dtype.itemsize if self.layout is None else self.layout.nbytes

    def of(self, rows: int) -> _Kind:
        """The same with so many rows."""
        return self._replace(rows=rows, layout=None if self.layout is None else replace(self.layout, rows=rows))

    def parts(self) -> list[_Kind]:
        """Itself, or what it is cut into where it is large."""
        most = max(ROW_BLOCK, int(_MOST_BYTES * self.rows / self.nbytes) // ROW_BLOCK * ROW_BLOCK)
        return [self.of(most)] * (self.rows // most) + [self.of(self.rows % most)] * (self.rows % most > 0)


def _linear_s(kind: _Kind) -> float:
    part = kind.parts()[0]
    count = min(_MOST_LINEARS, max(2, -(-cold_bytes() // part.nbytes)))
    layers = itertools.cycle([_linear(part) for _ in range(count)])
    x = torch.randn(1, kind.inputs).to(kind.dtype)
    with torch.inference_mode():
        return _median_s(lambda: next(layers)(x)) * kind.rows / part.rows


def _linear(kind: _Kind) -> torch.nn.Module:
    inputs, rows, bias, dtype, layout = kind
    if layout is None:
        plain = torch.nn.Linear(inputs, rows, bias=bias, device="meta", dtype=dtype).to_empty(device="cpu")
        for parameter in plain.parameters():
            _randomise(parameter.data)
        return plain
    from swapless.runtime.linear import QuantizedLinear  # kernels are compiled when they are imported

    layer = QuantizedLinear(layout, torch.nn.Parameter(torch.zeros(rows, dtype=dtype)) if bias else None)
    memory = aligned_buffer(layout.nbytes)[: layout.nbytes]
    _fill_matrix(memory, layout)
    layer.fill(torch.from_numpy(memory))
    return layer


def _median_s(call: Callable[[], Any]) -> float:
    """Median of several timings, each over as many calls as make it long enough for the clock."""
    call()
    begun = time.perf_counter()
    call()
    calls = max(1, min(1000, round(_LEAST_S / _REPEATS / max(1e-7, time.perf_counter() - begun))))
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - begun) / calls)
    return statistics.median(seconds)


def _hidden_size(opened: OpenCheckpoint) -> int:
    return int(opened.config.get_text_config().hidden_size)


def _fill(pool: SlotPool, opened: OpenCheckpoint) -> None:
    first = pool.bytes_of(0)
    if opened.manifest is not None and opened.manifest.bits < 16:
        _fill_block(first, opened.manifest, opened.manifest.moe_layers[0])
    else:
        for tensor in pool.parameters(0, 0).values():
            _randomise(tensor)
    for slot in range(1, pool.slots):
        pool.bytes_of(slot)[:] = first


def _fill_block(block: np.ndarray, manifest: Manifest, layer: PackedLayer) -> None:
    block[:] = 0
    for piece in layer.pieces:
        if piece.bits < 16:
            _fill_matrix(block[piece.offset : piece.offset + piece.nbytes], manifest.layout(piece))


def _fill_matrix(memory: np.ndarray, layout: MatrixLayout) -> None:
    values, scales, zeros = layout.planes(memory)
    values.view(np.uint8).reshape(-1)[:] = np.resize(_noise(), values.nbytes)
    scales[:] = 0.01 if layout.bits == 8 else 0x3C24  # 0.01 as the upper half of a float32
    zeros[:] = 0x88


def _randomise(tensor: torch.Tensor) -> None:
    some = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    flat = tensor.view(-1)
    flat.copy_(some.repeat(-(-len(flat) // len(some)))[: len(flat)])


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)


def copy_bytes_per_s() -> float:
    """Bytes a second from memory to memory by one thread, as from a bounce buffer into a slot."""
    source, target = (aligned_buffer(cold_bytes() // 2) for _ in range(2))
    source[:] = 1
    target[:] = 1
    return len(source) / _median_s(lambda: np.copyto(target, source))


def read_bytes_per_s() -> float:
    """Bytes a second that all of torch's threads read out of memory together."""
    values = torch.ones(cold_bytes() // 4)
    return values.nbytes / _median_s(lambda: values.sum())


def matrices(weights: int) -> Iterator[tuple[str, float]]:
    """Weights a second of a plain and of rounded linear layers of about so many weights, each by its name."""
    side = max(64, int(weights**0.5) // 64 * 64)
    for name, bits in (("bf16", 16), ("int8", 8), ("int4", 4)):
        layout = MatrixLayout(rows=side, columns=side, bits=bits, group=GROUPS[0]) if bits < 16 else None
        yield name, side * side / _linear_s(_Kind(side, side, False, torch.bfloat16, layout))
