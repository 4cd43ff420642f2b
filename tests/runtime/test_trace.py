"""The recorded trace: the rows that were run, the phases, no padding, and the ids that the router's own logits give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swapless.errors import ReadError, TraceValueError
from swapless.notation import Phase
from swapless.runtime.record import Document, record
from swapless.runtime.routers import RouterTap
from swapless.trace import read_trace, write_trace
from tests.runtime.conftest import SHAPE, word_tokenizer


@pytest.fixture(params=["olmoe", "qwen3_moe"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def chosen_by_router(plain: Any, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights (T, L, K) recomputed from the logits that plain transformers gives out."""
    with torch.no_grad():
        logits = plain(input_ids=ids, output_router_logits=True).router_logits
    assert len(logits) == SHAPE.num_moe_layers
    weights, experts = zip(*(layer.float().softmax(-1).topk(SHAPE.top_k) for layer in logits), strict=True)
    return torch.stack(experts, 1).numpy(), torch.stack(weights, 1).numpy()


def test_rows_phases_and_ids_of_a_generation(folder: Path, load: Any, eager: Any, generate: Any, prompt: Any) -> None:
    model = load(folder)
    tokens = generate(model, prompt, 6)
    trace = model.swapless.trace()
    n = prompt.shape[1]
    assert trace.expert_ids.shape == (n + 5, SHAPE.num_moe_layers, SHAPE.top_k)
    assert trace.token_id.tolist() == tokens[0, :-1].tolist(), "the last token is never fed back"
    assert trace.phase.tolist() == [Phase.PREFILL] * n + [Phase.DECODE] * 5
    assert trace.position.tolist() == list(range(n + 5)) and set(trace.document.tolist()) == {0}
    assert trace.step.tolist() == [0] * n + [1, 2, 3, 4, 5]
    header = trace.header
    assert (header.num_experts, header.top_k, header.moe_blocks) == (SHAPE.num_experts, SHAPE.top_k, (0, 1, 2))
    assert header.model_type == folder.name.rstrip("0123456789")
    experts, weights = chosen_by_router(eager(folder), prompt)
    assert np.array_equal(trace.expert_ids[:n], experts)
    if folder.name.startswith("olmoe"):  # Qwen3-MoE normalises its weights
        assert np.allclose(trace.gate_weights[:n], weights, atol=2e-3)


def test_decode_rows_hold_what_the_router_chose(olmoe: Path, load: Any, eager: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe, dtype="float32", resident=0.125)
    tokens = generate(model, prompt, 8)
    experts, _ = chosen_by_router(eager(olmoe, dtype=torch.float32), tokens[:, :-1])
    assert np.array_equal(model.swapless.trace().expert_ids, experts)


def test_padding_is_no_routing(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe)
    batch = torch.cat([prompt, prompt.flip(1)])
    batch[1, :4] = 0
    mask = (batch != 0).long()
    generate(model, batch, 4, attention_mask=mask)
    trace = model.swapless.trace()
    assert len(trace) == int(mask.sum()) + 2 * 3
    assert np.bincount(trace.document).tolist() == [prompt.shape[1] + 3, prompt.shape[1] - 4 + 3]
    second = trace.document == 1
    assert trace.position[second].tolist() == list(range(int(second.sum())))
    assert trace.token_id[second][: prompt.shape[1] - 4].tolist() == batch[1, 4:].tolist()
    stats = model.swapless.stats()
    assert (stats.prefill_tokens, stats.decode_tokens) == (int(mask.sum()), 2 * 3)


def test_every_generation_is_a_document_of_its_own(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe)
    for _ in range(3):
        generate(model, prompt, 3)
    trace = model.swapless.trace()
    assert np.bincount(trace.document).tolist() == [prompt.shape[1] + 2] * 3
    assert trace.step.max() == 8
    model.swapless.reset_trace()
    with pytest.raises(TraceValueError, match="no routing yet"):
        model.swapless.trace()


def test_through_a_file_and_back(olmoe: Path, load: Any, generate: Any, prompt: Any, tmp_path: Path) -> None:
    model = load(olmoe)
    generate(model, prompt, 4)
    trace = model.swapless.trace()
    write_trace(tmp_path / "trace.parquet", trace)
    again = read_trace(tmp_path / "trace.parquet")
    for name in ("expert_ids", "gate_weights", "document", "position", "phase", "step", "token_id"):
        assert np.array_equal(getattr(again, name), getattr(trace, name)), name
    assert again.header.model_type == "olmoe"


def test_recording_changes_no_output(folder: Path, load: Any, eager: Any, prompt: Any) -> None:
    """Routing is always recorded; the scores of all experts only when asked for."""
    model, plain = load(folder), eager(folder)
    with torch.no_grad():
        expected = plain(input_ids=prompt, output_router_logits=True)
        before = model(input_ids=prompt).logits
        tap = RouterTap(model)
        model.swapless.record_scores(tap)
        during = model(input_ids=prompt).logits
        trace = model.swapless.trace()
        tap.remove()
        model.swapless.record_scores(None)
        after = model(input_ids=prompt).logits
    for logits in (before, during, after):
        assert torch.equal(logits, expected.logits)
    scores = torch.stack(expected.router_logits, 1).float().numpy()
    assert np.allclose(trace.router_scores, scores, atol=4e-3 * np.abs(scores).max())
    assert model.swapless.trace().router_scores is None


def test_a_failed_call_leaves_no_rows(own_olmoe: Path, load: Any, prompt: Any) -> None:
    model = load(own_olmoe)
    with torch.no_grad():
        model(input_ids=prompt)
    for shard in own_olmoe.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ReadError), torch.no_grad():
        model(input_ids=prompt.flip(1))
    assert len(model.swapless.trace()) == prompt.shape[1]


@pytest.mark.parametrize("decode_tokens", [None, 0, 4])
def test_documents_of_a_recording_are_whole(decode_tokens: int | None, olmoe: Path, load: Any, tmp_path: Path) -> None:
    """Also one that begins with all of the one before it."""
    words = ["w5 w6 w7", "w5 w6 w7 w8 w9", "w5 w6 w7 w8 w9", "w5"]
    with load(olmoe) as model:
        record(model, word_tokenizer(), [Document(text) for text in words], tmp_path / "t.parquet", decode_tokens=decode_tokens)
    trace = read_trace(tmp_path / "t.parquet")
    assert trace.num_documents == 4 and trace.header.notes is None
    for document, text in enumerate(words):
        rows = trace.rows(trace.document == document)
        read = [int(word[1:]) for word in text.split()]
        assert rows.token_id[: len(read)].tolist() == read and rows.position.tolist() == list(range(len(rows)))
        assert len(rows) <= len(read) + (decode_tokens or 0)
        decoded = len(read) - 1 if decode_tokens is None else len(rows) - len(read)
        assert rows.phase.tolist() == [Phase.PREFILL] * (len(rows) - decoded) + [Phase.DECODE] * decoded


def test_a_document_that_is_not_kept_whole_is_refused(olmoe: Path, load: Any, tmp_path: Path) -> None:
    model = load(olmoe)
    model.swapless._routing._bounds = 16, 1, 1
    text = " ".join(f"w{number}" for number in range(4, 64))
    with pytest.raises(TraceValueError, match=r"not kept whole.*document 0.*dropped"):
        record(model, word_tokenizer(), [Document(text)], tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()
