"""The routing log: bounded in memory and on disk, and texts put together from rows that were run in any order."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
import torch

from swapless.errors import TraceValueError
from swapless.notation import NO_EXPERT, Phase
from swapless.runtime.held import Held
from swapless.runtime.routing import RoutingLog, Step
from swapless.runtime.texts import NO_ROW, Texts
from swapless.trace import TraceHeader

LAYERS, EXPERTS, TOP_K = 4, 16, 2


def log_of(**bounds: Any) -> RoutingLog:
    header = TraceHeader(model_id=None, num_experts=EXPERTS, top_k=TOP_K, moe_blocks=tuple(range(LAYERS)))
    return RoutingLog(header, **bounds)


def fill(log: RoutingLog, tokens: int, seed: int = 0) -> Held:
    """One text of so many tokens: a prefill of 5, then a step a token. Row r has token r."""
    generator = np.random.default_rng(seed)
    held, done = Held(log.texts, 1), 0
    while done < tokens:
        rows = min(5, tokens) if done == 0 else 1
        position = np.arange(done, done + rows, dtype=np.int32)
        number = log.texts.next_row + np.arange(rows)
        parent = np.append(held.last(), number[:-1])
        phase = Phase.DECODE if done else Phase.PREFILL
        log.begin(Step(phase, np.zeros(rows, np.int32), position, np.ones(rows, bool), position, parent=parent))
        for layer in range(LAYERS):
            ids = np.stack([generator.permutation(EXPERTS)[:TOP_K] for _ in range(rows)])
            log.add(layer, torch.from_numpy(ids), torch.from_numpy(generator.random((rows, TOP_K), np.float32)))
        log.end()
        held.append(number[None])
        done += rows
    return held


def test_rows_that_lie_in_a_file_are_the_same() -> None:
    wide, narrow = log_of(), log_of(memory_bytes=1)
    for log in (wide, narrow):
        fill(log, 400)
    here, there = wide.trace(), narrow.trace()
    assert narrow._store._file is not None and wide._store._file is None
    for name in ("expert_ids", "gate_weights", "document", "position", "phase", "step", "token_id"):
        assert np.array_equal(getattr(here, name), getattr(there, name)), name
    assert here.header.notes is there.header.notes is None


def test_memory_and_file_are_bounded() -> None:
    log = log_of(max_tokens=300, memory_bytes=1)
    for seed in range(5):
        fill(log, 200, seed)
    in_memory = [chunk for chunk in log._store._chunks if isinstance(chunk, np.ndarray)]
    assert len(in_memory) <= 5 and log._store._next_place * log._store._chunk_rows <= 320
    trace = log.trace()
    assert 300 <= len(trace) <= 340 and trace.position[-1] == 199
    assert f"first {1000 - len(trace)} rows were dropped" in trace.header.notes
    assert "not here: 1" in trace.header.notes and trace.num_documents == 2


@pytest.mark.parametrize("how", ["no file can be made", "the disk is full", "the file is full"])
def test_where_no_file_can_be_written_old_rows_go(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    if how == "no file can be made":
        monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    elif how == "the disk is full":
        monkeypatch.setattr("os.pwrite", fail)
    log = log_of(memory_bytes=1, file_bytes=1 if how == "the file is full" else 1 << 20)
    fill(log, 400)
    trace = log.trace()
    assert len(trace) < 100 and trace.position[-1] == 399
    assert f"first {400 - len(trace)} rows were dropped" in trace.header.notes


def test_the_log_of_a_long_run_stays_small() -> None:
    """What is kept of a row beside its routing, too."""
    log = log_of(max_tokens=500, memory_bytes=1)
    for seed in range(10):
        fill(log, 300, seed)
    assert len(log.texts._parent) <= 1024 and len(log.texts._ends) <= 3


def test_forgetting_makes_steps_go_on() -> None:
    log = log_of()
    fill(log, 10)
    last = int(log.trace().step[-1])
    log.clear()
    with pytest.raises(TraceValueError, match="no routing yet"):
        log.trace()
    fill(log, 10)
    assert log.trace().step[0] == last + 1 and log.trace().document.max() == 0


def test_a_long_beginning_that_many_share_stands_in_the_first_alone() -> None:
    log = log_of(max_tokens=400)
    held = fill(log, 100)
    for _ in range(5):
        append(log.texts, held, 4)
        records = np.zeros(4, log._store.record)
        records["ids"], records["position"], records["step"] = NO_EXPERT, np.arange(100, 104), log.texts.next_row
        log._store.append(records)
        held.crop(100)
    trace = log.trace()
    assert len(trace) == 100 + 5 * 4 and trace.num_documents == 5
    assert "stands in the first of them alone: 4" in trace.header.notes
    assert [int((trace.document == document).sum()) for document in range(5)] == [104, 4, 4, 4, 4]


# -- texts ---------------------------------------------------------------------------------------------------------------


def append(texts: Texts, held: Held, calls: int = 1, rows: int = 1, drafts: int = 0) -> None:
    for _ in range(calls):
        number = texts.next_row + np.arange(held.batch * rows).reshape(held.batch, rows)
        parent = np.concatenate([held.last()[:, None], number[:, :-1]], axis=1)
        texts.append(parent.reshape(-1), None, Phase.DECODE)
        held.append(number, drafts)


def paths(texts: Texts) -> list[list[int]]:
    return [path.rows.tolist() for path in texts.paths()]


@pytest.fixture
def texts() -> Texts:
    return Texts()


def test_sequences_side_by_side(texts: Texts) -> None:
    held = Held(texts, 2)
    append(texts, held, rows=2)
    append(texts, held, 2)
    assert paths(texts) == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert all(path.whole and path.shared == 0 for path in texts.paths())


def test_beams_are_the_paths_that_lead_to_them(texts: Texts) -> None:
    held = Held(texts, 3)
    held.in_generation = True
    append(texts, held)
    held.select(np.array([1, 1, 2]))
    append(texts, held)
    held.select(np.array([2, 0, 0]))
    assert paths(texts) == [[1, 3], [2, 5]] and held.reordered
    append(texts, held)
    assert paths(texts) == [[1, 3, 7], [2, 5, 6], [1, 3, 8]]
    assert [path.shared for path in texts.paths()] == [0, 0, 2]


def test_drafts_are_text_once_they_are_accepted(texts: Texts) -> None:
    held = Held(texts, 1)
    held.in_generation = True
    append(texts, held, rows=3)
    append(texts, held, rows=4, drafts=3)
    assert paths(texts) == [[0, 1, 2, 3]] and texts.num_taken_back(Phase.DECODE) == texts.undecided == 3
    held.crop(6)
    assert paths(texts) == [[0, 1, 2, 3, 4, 5]] and texts.num_taken_back(Phase.DECODE) == 1 and texts.undecided == 0
    append(texts, held, rows=3, drafts=2)
    held.crop(held.length)
    assert paths(texts) == [[0, 1, 2, 3, 4, 5, 7, 8, 9]] and texts.num_taken_back(Phase.DECODE) == 1


def test_drafts_in_steps_of_one(texts: Texts) -> None:
    held = Held(texts, 1)
    held.of_assistant = True
    append(texts, held, rows=3)
    append(texts, held, 4, drafts=1)
    assert paths(texts) == [[0, 1, 2]] and texts.undecided == 4
    held.crop(5)
    assert paths(texts) == [[0, 1, 2, 3, 4]] and texts.undecided == 0 and texts.num_taken_back(Phase.DECODE) == 2
    held.crop(2)
    assert paths(texts) == [[0, 1]] and texts.num_taken_back(Phase.DECODE) == 5


def test_counting_begins_where_it_is_told_to(texts: Texts) -> None:
    held = Held(texts, 1)
    held.in_generation = True
    append(texts, held, 3)
    texts.count_from_here()
    append(texts, held, 2)
    held.crop(1)
    assert texts.num_taken_back(Phase.DECODE) == 2


def test_an_end_that_another_text_passes(texts: Texts) -> None:
    held = Held(texts, 1)
    append(texts, held, 5)
    texts.finish(2)
    assert paths(texts) == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert NO_ROW not in {row for path in paths(texts) for row in path}


def test_the_rows_of_a_sequence_of_tokens(texts: Texts) -> None:
    held = Held(texts, 2)
    for number, tokens in enumerate(([7, 7], [1, 2], [3, 3], [2, 5])):
        texts.append(held.last(), np.array(tokens, np.int32), Phase.DECODE)
        held.append(np.arange(2)[:, None] + 2 * number)
    assert texts.matches(range(8), [np.array([7, 1, 3, 9])]) == {4}
    assert texts.matches(range(8), [np.array([7, 2, 3, 5]), np.array([-1, 1, 3, 2])]) == {7, 6}
    assert texts.matches(range(2, 8), [np.array([7, 2, 3, 5]), np.array([8, 1, 3, 2])]) == {7}
