"""The model without its weights, run by the real engine and cache: products answer zero at once.

What a forward call of it takes is what transformers and the engine take beside weights and reads.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.cache.policy import Policy
from swapless.cache.residency import layer_pools
from swapless.cache.serve import ExpertCache
from swapless.plan.traffic import Traffic
from swapless.runtime.ahead import Lookahead
from swapless.runtime.budget import Budget
from swapless.runtime.compute import Experts
from swapless.runtime.door import experts_of, group_heads
from swapless.runtime.engine import Engine
from swapless.runtime.fetch import Fetcher
from swapless.runtime.lookahead import GateLookahead
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.routing import RoutingLog
from swapless.runtime.steps import StepHooks
from swapless.store.probe import Probe
from swapless.trace import TraceHeader

_PROMPT_TOKENS = 16
_WARM_UP = 3
_MOST_TOKENS = 1024


class Linear(NamedTuple):
    """A linear layer as it was called: its path, inputs, outputs, and whether it has a bias."""

    path: str
    inputs: int
    outputs: int
    bias: bool


class Times(NamedTuple):
    """Of several steps: the usual seconds, and the least, which a neighbour on the machine disturbed least."""

    median: float
    least: float


class HollowStep(NamedTuple):
    """``seconds`` of a decode step without weights and reads, and the linear layers that it called, with how often."""

    seconds: float
    linears: dict[Linear, int]


class HollowRun:
    """A hollow model that decodes, with the real engine around experts that are all there; a context manager.

    Parameters
    ----------
    model : PreTrainedModel
        From :func:`~swapless.runtime.hollow.hollow_model`; it belongs to the run from now on.
    opened : OpenCheckpoint
        What it is the model of.
    policy : Policy
        Kept busy as in a run.
    budget : Budget
        Any of this model.

    Attributes
    ----------
    lookahead : GateLookahead
        Asks its routers.
    num_moe_layers, num_experts, top_k : int
        L, E and K.
    """

    def __init__(self, model: PreTrainedModel, opened: OpenCheckpoint, policy: Policy, budget: Budget) -> None:
        self._model: Any = model
        self._called: Counter[Linear] = Counter()
        self._counting = False
        self._experts: Experts = _zero_experts
        self._experts_s = 0.0
        self._cache: Any = None
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                key = Linear(path, module.in_features, module.out_features, module.bias is not None)
                module.register_forward_pre_hook(lambda *_, key=key: self._called.update([key] if self._counting else ()))
        self.lookahead = GateLookahead(model, required=False)
        self.num_moe_layers = len(opened.layout.moe_layers)
        self.num_experts = min(layer.num_experts for layer in opened.layout.moe_layers)
        self.top_k = max(1, opened.experts_a_token // self.num_moe_layers)
        self._engine = _engine(opened, policy, budget, self._compute, self.lookahead)
        self._prefetcher = self._engine._fetcher.prefetcher
        for moe_layer, (_, experts) in enumerate(experts_of(model)):
            experts.swapless_moe_layer = moe_layer  # type: ignore[assignment]
        self._route_to(self._engine)
        self._hooks = StepHooks(self._engine, _MOST_TOKENS, rounded=opened.rounded)
        self._hooks.attach(model)

    def __enter__(self) -> HollowRun:
        self._forward(_PROMPT_TOKENS)  # which shows the routers
        self._engine._fetcher.prefetcher = None
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def step(self, steps: int = 12) -> HollowStep:
        """The median of so many steps whose linear layers and experts answer zero at once."""
        seconds = self._times(steps).median
        self._counting = True
        self._forward(1)
        self._counting = False
        return HollowStep(seconds, dict(self._called))

    def compute_as(self, form: OpenCheckpoint) -> None:
        """From now on, the attention and torch's products as in a load of ``form``."""
        group_heads(self._model, form.rounded)
        self._hooks.rounded = form.rounded

    def steps_s(self, steps: int = 12) -> Times:
        """Seconds of a step whose experts answer zero; within :meth:`computing`, its linear layers do not."""
        return self._times(steps)

    @contextmanager
    def computing(self, products: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Linear layers compute ``products``, by path, for as long as it is open."""
        modules = dict(self._model.named_modules())
        hollow = {path: modules[path].forward for path in products}
        for path, product in products.items():
            modules[path].forward = product
        try:
            yield
        finally:
            for path, forward in hollow.items():
                modules[path].forward = forward

    def missing_s(self, steps: int = 12) -> float:
        """Seconds of a hollow step that finds no expert resident and reads all of them, no bytes each."""
        cache = self._engine._cache
        every = np.arange(cache.num_experts)

        def forget() -> None:
            for moe_layer in range(cache.num_moe_layers):
                cache.forget(moe_layer, every)

        return self._times(steps, forget).median

    @property
    def foresees(self) -> bool:
        """Whether this family's routers can be asked ahead."""
        return self.lookahead.routers > 0

    def foreseeing_s(self, steps: int = 12) -> float:
        """Seconds of a hollow step that asks the routers ahead, and finds everything resident."""
        self._engine._fetcher.prefetcher = self._prefetcher
        try:
            return self._times(steps).median
        finally:
            self._engine._fetcher.prefetcher = None

    @contextmanager
    def reading(
        self, pool: Any, traffic: Traffic, threads: int, lookahead: Lookahead | None
    ) -> Iterator[Callable[[np.ndarray, np.random.Generator], float]]:
        """For as long as it is open, experts are computed in ``pool`` and read there by so many threads; closes ``traffic``.

        Every token wants the first K experts of a MoE layer then. Gives a function that decodes one with so many of them
        missing in each MoE layer, int64 (L,), picked by a generator, and returns its seconds.
        """
        engine, at_rest, store = self._engine, self._engine._fetcher, cast(Any, traffic)
        engine._fetcher = Fetcher(store, pool, engine.budget, threads, lookahead, self.resident)
        self._experts, self._cache = pool.compute, None

        def step(misses: np.ndarray, rng: np.random.Generator) -> float:
            for moe_layer, count in enumerate(misses.tolist()):
                engine._cache.forget(moe_layer, rng.choice(self.top_k, count, replace=False))
            return self._forward(1)

        self._route_to(_Steady(engine, self.top_k))
        try:
            self._forward(_PROMPT_TOKENS)
            yield step
        finally:
            self._route_to(engine)
            engine._fetcher.close()
            engine._fetcher, self._experts = at_rest, _zero_experts

    @property
    def blocks(self) -> int:
        """Places of the engine for experts, but for those read ahead."""
        return self._engine.budget.slots + self._engine.budget.staging_blocks

    def resident(self, moe_layer: int, expert: int) -> bool:
        """Whether an expert is in a slot now."""
        return self._engine._cache.resident(moe_layer, expert)

    def _route_to(self, engine: Any) -> None:
        for _, experts in experts_of(self._model):
            experts.swapless_engine = engine

    def experts_s(self, experts: Experts, steps: int = 12) -> Times:
        """Seconds a step spends in ``experts``, with other work in between as in a run: no cache and no thread stays warm."""
        self._experts, seconds = experts, []
        for _ in range(_WARM_UP + steps):
            self._experts_s = 0.0
            self._forward(1)
            seconds.append(self._experts_s)
        self._experts = _zero_experts
        return _times(seconds)

    def _times(self, steps: int, before: Callable[[], None] = lambda: None) -> Times:
        seconds = []
        for _ in range(_WARM_UP + steps):
            before()
            seconds.append(self._forward(1))
        return _times(seconds)

    @torch.inference_mode()
    def _forward(self, tokens: int) -> float:
        begun = time.perf_counter()
        output = self._model(input_ids=torch.ones((1, tokens), dtype=torch.long), past_key_values=self._cache, use_cache=True)
        self._cache = getattr(output, "past_key_values", None)
        return time.perf_counter() - begun

    def _compute(
        self, module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        begun = time.perf_counter()
        out = self._experts(module, moe_layer, blocks, hidden)
        self._experts_s += time.perf_counter() - begun
        return out


def _times(seconds: list[float]) -> Times:
    counted = seconds[_WARM_UP:]
    return Times(statistics.median(counted), min(counted))


def _engine(opened: OpenCheckpoint, policy: Policy, budget: Budget, experts: Experts, lookahead: GateLookahead) -> Engine:
    layers = opened.layout.moe_layers
    num_experts = max(layer.num_experts for layer in layers)
    header = TraceHeader(
        model_id=None,
        num_experts=num_experts,
        top_k=opened.experts_a_token // len(layers),
        moe_blocks=tuple(layer.block for layer in layers),
    )
    store: Any = _NoStore()
    pool: Any = _NoPool()
    return Engine(
        store=store,
        cache=ExpertCache(policy, len(layers), num_experts, *layer_pools(len(layers), num_experts, budget.slots)),
        pool=pool,
        experts=experts,
        budget=budget,
        probe=Probe(block_bytes=0, bytes_per_s={1: 1.0}, fixed_s=0.0, depth=1, direct=False),
        meter=MemoryMeter(),
        routing=RoutingLog(header),
        lookahead=lookahead,
    )


def _zero_experts(module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(tokens) for tokens in hidden]


class _Steady:
    """Passes calls on to the engine, whatever the router said as if it had chosen the first K experts."""

    def __init__(self, engine: Engine, top_k: int) -> None:
        self._engine, self._first = engine, torch.arange(top_k)

    def forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        tokens, ids = len(ids_TK), self._first
        return self._engine.forward(module, hidden_TD, ids.repeat(tokens, 1), weights_TK[:, :1].repeat(1, len(ids)))


class _NoStore:
    """Experts of no bytes."""

    def bounce_buffer(self) -> np.ndarray:
        return np.empty(0, np.uint8)

    def parts(self, moe_layer: int, expert: int) -> int:
        return 1

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        return 0

    def close(self) -> None:
        """There is nothing to close."""


class _NoPool:
    """Slots of no bytes, and none beside the cache."""

    slots = 0

    def bytes_of(self, slot: int) -> np.ndarray:
        return np.empty(0, np.uint8)

    def close(self) -> None:
        """There is nothing to give back."""
