"""Calls of one model from several threads, from inside each other, and from a thread that closes it: all right, or an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import swapless
from swapless.errors import ClosedError, UnsupportedOperationError
from swapless.runtime.packing import pack
from swapless.runtime.verification import verify
from tests.runtime.conftest import SHAPE

TOKENS = 24
PATIENCE_S = 300


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Run ``actions`` in threads of their own, begun at once; their results or exceptions."""
    results: list[Any] = [None] * len(actions)
    begin = threading.Barrier(len(actions), timeout=PATIENCE_S)

    def run(number: int) -> None:
        begin.wait()
        try:
            results[number] = actions[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "hangs"
    return results


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, SHAPE.vocabulary, (1, length), generator=generator) for length in (9, 12, 5)]


def assert_all_equal(got: Sequence[Any], wanted: Sequence[torch.Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, torch.Tensor), repr(one)
        assert torch.equal(one, other)


@pytest.mark.few(1)
@pytest.mark.parametrize("prefetch", ["none", "gate"])
def test_threads_of_a_server_all_get_the_right_answer(
    prefetch: str, olmoe: Path, load: Any, eager: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    model, plain = load(olmoe, resident=0.25, prefetch=prefetch), eager(olmoe)
    wanted = [generate(plain, ids, TOKENS) for ids in prompts]
    for _ in range(2):
        got = together(*[lambda ids=ids: generate(model, ids, TOKENS) for ids in prompts])  # type: ignore[misc]
        assert_all_equal(got, wanted)
        model.swapless.check_integrity()
    stats = model.swapless.stats()
    assert stats.steps == 2 * 3 * TOKENS
    assert stats.decode_tokens == 2 * 3 * (TOKENS - 1)


@pytest.mark.slow
def test_threads_of_a_packed_model_with_rounded_layers(
    qwen3_moe: Path, tmp_path: Path, load: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    pack(qwen3_moe, tmp_path / "store", bits=4, dense_bits=4)
    model = load(tmp_path / "store", resident=0.25)
    wanted = [generate(model, ids, TOKENS) for ids in prompts]
    assert_all_equal(together(*[lambda ids=ids: generate(model, ids, TOKENS) for ids in prompts]), wanted)  # type: ignore[misc]
    # The inner model has no hooks and no turn of its own.
    with torch.no_grad():
        states = [model.model(input_ids=ids).last_hidden_state for ids in prompts]

    def inner(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return [model.model(input_ids=ids).last_hidden_state for _ in range(8)][-1]

    assert_all_equal(together(*[lambda ids=ids: inner(ids) for ids in prompts]), states)  # type: ignore[misc]
    model.swapless.check_integrity()


def test_parts_of_a_model_in_one_thread_and_the_whole_in_another(
    olmoe: Path, load: Any, eager: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    model, plain = load(olmoe, resident=0.25), eager(olmoe)
    wanted = generate(plain, prompts[0], TOKENS)
    with torch.no_grad():
        state = plain.model(input_ids=prompts[1]).last_hidden_state

    def inner() -> torch.Tensor:
        with torch.no_grad():
            return [model.model(input_ids=prompts[1]).last_hidden_state for _ in range(12)][-1]

    assert_all_equal(together(lambda: generate(model, prompts[0], TOKENS), inner), [wanted, state])
    trace = model.swapless.trace()
    assert len(trace) == prompts[0].shape[1] + TOKENS - 1, "rows of the inner model are none of the text"


def test_the_routing_of_two_threads_is_that_of_two_texts(
    olmoe: Path, load: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    model = load(olmoe, resident=0.25)
    alone = []
    for ids in prompts[:2]:
        model.swapless.reset_trace()
        generate(model, ids, TOKENS)
        alone.append(model.swapless.trace().expert_ids)
    model.swapless.reset_trace()
    together(*[lambda ids=ids: generate(model, ids, TOKENS) for ids in prompts[:2]])  # type: ignore[misc]
    rows = model.swapless.trace().expert_ids
    assert len(rows) == sum(map(len, alone))
    assert sorted(map(bytes, rows)) == sorted(map(bytes, np.concatenate(alone))), "a row is lost, or mixed of two"


def test_a_model_of_another_thread_and_of_asyncio(olmoe: Path, eager: Any, generate: Any, prompts: list[torch.Tensor]) -> None:
    wanted = [generate(eager(olmoe), ids, 8) for ids in prompts]
    with ThreadPoolExecutor(1) as elsewhere:
        model = elsewhere.submit(swapless.load, olmoe, resident=0.25, context=64).result()

    async def served() -> list[torch.Tensor]:
        return list(await asyncio.gather(*(asyncio.to_thread(generate, model, ids, 8) for ids in prompts)))

    with model:
        assert_all_equal(asyncio.run(served()), wanted)
        model.swapless.check_integrity()


def test_two_models_loaded_and_run_at_once(
    olmoe: Path, qwen3_moe: Path, eager: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    folders = [olmoe, qwen3_moe]

    def served(folder: Path) -> torch.Tensor:
        with swapless.load(folder, resident=0.25, context=64) as model:
            tokens: torch.Tensor = generate(model, prompts[0], TOKENS)
            model.swapless.check_integrity()
            return tokens

    wanted = [generate(eager(folder), prompts[0], TOKENS) for folder in folders]
    assert_all_equal(together(*[lambda folder=folder: served(folder) for folder in folders]), wanted)  # type: ignore[misc]
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype())


# -- close beside a call ---------------------------------------------------------------------------------------------------


class AtToken(BaseStreamer):
    """Calls ``action`` once, when ``generate`` hands out its ``number``-th piece."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self._left, self._action = number, action

    def put(self, value: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()

    def end(self) -> None: ...


@pytest.mark.parametrize("packed", [False, True])
def test_close_waits_for_the_call_that_is_under_way(
    packed: bool, qwen3_moe: Path, tmp_path: Path, load: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    if packed:
        pack(qwen3_moe, tmp_path / "store", bits=4, dense_bits=4)
    model = load(tmp_path / "store" if packed else qwen3_moe, resident=0.25)
    running = threading.Event()
    before = threading.active_count()

    def close() -> None:
        assert running.wait(PATIENCE_S)
        model.swapless.close()

    answer, closed = together(lambda: generate(model, prompts[0], 40, streamer=AtToken(3, running.set)), close)
    assert closed is None
    assert isinstance(answer, (torch.Tensor, ClosedError)), repr(answer)
    assert threading.active_count() < before, "its reader threads are gone"
    with pytest.raises(ClosedError):
        generate(model, prompts[0], 3)


def test_close_from_inside_a_call_is_refused(olmoe: Path, load: Any, generate: Any, prompts: list[torch.Tensor]) -> None:
    model = load(olmoe)
    wanted = generate(model, prompts[0])
    hook = model.lm_head.register_forward_pre_hook(lambda *_: model.swapless.close())
    with pytest.raises(UnsupportedOperationError, match="inside its own forward call"):
        generate(model, prompts[0])
    hook.remove()
    model.swapless.check_integrity()
    assert torch.equal(generate(model, prompts[0]), wanted)


# -- calls inside calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", ["none", "gate"])
def test_a_hook_may_call_the_model_between_two_blocks(
    prefetch: str, olmoe: Path, load: Any, eager: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    model, plain = load(olmoe, resident=0.25, prefetch=prefetch), eager(olmoe)
    wanted = generate(plain, prompts[0], 8)
    with torch.no_grad():
        inner_wanted = plain(input_ids=prompts[1]).logits
    inner, depth = [], [0]

    def call(*_: Any) -> None:
        if depth[0] == 0:
            depth[0] += 1
            with torch.no_grad():
                inner.append(model(input_ids=prompts[1]).logits)
            depth[0] -= 1

    generate(model, prompts[2], 2)
    model.swapless.reset_trace()
    model.swapless.reset_stats()
    hook = model.model.layers[1].register_forward_pre_hook(call)
    assert torch.equal(generate(model, prompts[0], 8), wanted)
    hook.remove()
    assert len(inner) == 8 and all(torch.equal(logits, inner_wanted) for logits in inner)
    stats, trace = model.swapless.stats(), model.swapless.trace()
    assert (stats.steps, stats.decode_tokens) == (16, 7)
    assert stats.prefill_tokens == prompts[0].shape[1]
    assert stats.stall_s + stats.compute_s == pytest.approx(stats.prefill_s + stats.decode_s)
    assert len(trace) == 7 + prompts[0].shape[1] and len(np.unique(trace.step)) == 8, "a call inside another is no text"
    assert (np.asarray(trace.expert_ids) >= 0).all(), "an outer call goes on where it was"
    model.swapless.check_integrity()


def test_a_hook_inside_the_experts_may_not(olmoe: Path, load: Any, generate: Any, prompts: list[torch.Tensor]) -> None:
    model = load(olmoe)
    wanted = generate(model, prompts[0])
    act = model.model.layers[1].mlp.experts.act_fn
    hook = act.register_forward_hook(lambda *_: model(input_ids=prompts[1]) and None)
    with pytest.raises(UnsupportedOperationError, match="inside its own experts"):
        generate(model, prompts[0])
    hook.remove()
    model.swapless.check_integrity()
    assert torch.equal(generate(model, prompts[0]), wanted)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_between_two_blocks_leaves_nothing_behind(
    error: type[BaseException], olmoe: Path, load: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    model = load(olmoe, prefetch="gate")
    wanted = generate(model, prompts[0])
    model.swapless.reset_trace()
    before = model.swapless.stats()

    def fail(*_: Any) -> None:
        raise error("mine")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(error, match="mine"):
        generate(model, prompts[0])
    hook.remove()
    assert model.swapless.stats().steps == before.steps
    with torch.no_grad():
        model.model(input_ids=prompts[1])  # its blocks belong to no step: neither to the one that failed
    model.swapless.check_integrity()
    assert torch.equal(generate(model, prompts[0]), wanted)
    assert len(model.swapless.trace()) == prompts[0].shape[1] + 7


def test_two_texts_in_turns_in_one_thread(olmoe: Path, load: Any, eager: Any, prompts: list[torch.Tensor]) -> None:
    model, plain = load(olmoe, resident=0.25, prefetch="gate"), eager(olmoe)

    def decode(who: Any, ids: torch.Tensor) -> Any:
        cache, token = None, ids
        for _ in range(10):
            with torch.no_grad():
                out = who(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield out.logits

    wanted = [list(decode(plain, ids)) for ids in prompts[:2]]
    for ours, theirs in zip(zip(*(decode(model, ids) for ids in prompts[:2])), zip(*wanted, strict=True), strict=True):
        assert_all_equal(ours, theirs)
    abandoned = decode(model, prompts[2])
    next(abandoned)
    del abandoned
    model.swapless.check_integrity()


# -- switches of the whole process -----------------------------------------------------------------------------------------


def test_the_type_that_torch_makes_by_default_does_not_matter(
    qwen3_moe: Path, tmp_path: Path, load: Any, generate: Any, prompts: list[torch.Tensor]
) -> None:
    # transformers changes it for the whole process while it builds a model, in whichever thread.
    pack(qwen3_moe, tmp_path / "store", bits=4, dense_bits=4)
    model = load(tmp_path / "store", resident=0.25)
    wanted = generate(model, prompts[0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(generate(model, prompts[0]), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(generate(model, prompts[0]), wanted)


def test_verify_changes_the_number_of_threads_only_while_it_computes(olmoe: Path) -> None:
    torch.set_num_threads(2)
    before = threading.active_count()
    results = verify(olmoe)
    assert next(results).identical
    assert torch.get_num_threads() == 2
    results.close()
    assert torch.get_num_threads() == 2 and threading.active_count() == before
