"""The smallest traces, and arrays that do not fit: every predictor gives figures or refuses by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from swapless.errors import UsageError
from swapless.predict import _kernels
from swapless.predict.counts import CountTable
from swapless.predict.eam import Eam
from swapless.predict.expert_map import ExpertMap
from swapless.predict.features import FADES, TokenMemory
from swapless.predict.linear import Linear
from swapless.predict.popularity import Popularity
from swapless.predict.previous_token import PreviousToken
from swapless.predict.token_prior import TokenPrior
from swapless.predict.token_stream import open_stream
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace, TraceHeader

SHAPES = [(1, 1, 1, 1), (1, 3, 3, 1), (2, 2, 1, 3), (3, 4, 2, 2)]


def made(layers: int, experts: int, top_k: int, tokens: int, *, none: bool = False) -> Trace:
    header = TraceHeader(model_id="edge", num_experts=experts, top_k=top_k, moe_blocks=tuple(range(layers)))
    rng = np.random.default_rng(layers + experts)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[..., :top_k].astype(np.int16)
    if none:
        ids[:] = -1
    return Trace.from_arrays(header, expert_ids=ids, token_id=np.arange(tokens) % 2, phase="decode")


@pytest.mark.few(12)
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [Popularity, PreviousToken, TokenPrior, Eam])
def test_the_smallest_traces(kind, shape, none):
    trace = made(*shape, none=none)
    scores = kind().fit(trace).scores_batch(trace, 1)
    assert scores.shape == (len(trace), trace.num_moe_layers, trace.num_experts)
    assert np.isfinite(scores).all() and scores.min() >= 0


@pytest.mark.parametrize("kind", [PreviousToken, Eam, ExpertMap, Linear])
@pytest.mark.parametrize("bad", [4, -2, 999])
def test_a_trace_that_was_changed_after_its_checks_is_refused(kind, bad):
    trace = made(3, 4, 2, 2)
    fitted = kind().fit(trace)
    ids = np.array(trace.expert_ids)
    changed = replace(trace, expert_ids=ids.view())
    ids[1, 2, 0] = bad
    with pytest.raises(UsageError, match="out of range"):
        fitted.scores_batch(changed, 1)
    with pytest.raises(UsageError, match="out of range"):
        Eam().fit(changed)


def test_loops_refuse_arrays_that_do_not_fit():
    trace = made(3, 4, 2, 2)
    ids, rows = trace.expert_ids, np.array([0, 1])
    for wrong in (
        lambda: _kernels.multi_hot(ids, 4, np.zeros((2, 3, 5), np.uint8)),
        lambda: _kernels.multi_hot(ids, 4, np.zeros((2, 2, 4), np.uint8)),
        lambda: _kernels.multi_hot(ids, 4, np.zeros((1, 3, 4), np.uint8)),
        lambda: _kernels.multi_hot(ids.astype(np.int64), 4, np.zeros((2, 3, 4), np.uint8)),
        lambda: _kernels.add_routing(np.zeros((2, 11), np.uint16), rows, ids, 4),
        lambda: _kernels.add_routing(np.zeros((1, 12), np.uint16), rows, ids, 4),
        lambda: _kernels.add_routing(np.zeros((2, 12), np.uint16), rows[:1], ids, 4),
        lambda: _kernels.add_routing(np.zeros((2, 12), np.uint16), rows - 2, ids, 4),
        lambda: _kernels.document_past(ids, 4, FADES, np.zeros((2, 12), np.float32), np.zeros((1, 2, 12), np.float32)),
        lambda: _kernels.document_past(ids, 4, FADES, np.zeros((2, 11), np.float32), np.zeros((3, 2, 12), np.float32)),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_tables_that_do_not_fit_are_refused():
    keys, totals, counts = np.array([1, 2]), np.array([3, 4]), np.zeros((2, 12), np.uint16)
    CountTable(keys, totals, counts)
    for wrong in (
        (keys, totals[:1], counts),
        (keys, totals[:0], counts),
        (keys, totals, counts[:1]),
        (keys * 1.0, totals, counts),
    ):
        with pytest.raises(UsageError, match="table"):
            CountTable(*wrong)
    trace = made(3, 4, 2, 2)
    memory = TokenMemory.of(trace, Vocabulary.of(trace, "token_id"))
    narrow = CountTable(keys, totals, counts[:, :11])
    with pytest.raises(UsageError, match="table"):
        TokenMemory(memory.vocabulary, memory.popularity, narrow, memory.pair)
    with pytest.raises(UsageError, match="shape"):
        memory.inputs(trace.expert_ids[:, :2], np.zeros(2, np.int64))


def test_a_stream_refuses_ids_that_cannot_be():
    trace = made(3, 4, 2, 2)
    stream = open_stream(PreviousToken().fit(trace))
    stream.begin_token(0)
    for wrong in ([4], [-2], [0, 1, 2], [40000], [0.5]):
        with pytest.raises(UsageError, match="cannot be"):
            stream.observe(0, np.array(wrong))
    assert stream.observe(0, np.array([3, -1])).shape == (2, 4)
    for ids in (trace.expert_ids[:1], trace.expert_ids[..., :1], trace.expert_ids + 4, trace.expert_ids.astype(np.int64)):
        with pytest.raises(UsageError):
            stream.take_in([0, 1], ids)
