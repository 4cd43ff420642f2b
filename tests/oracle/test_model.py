"""The must-pass tests of the family: decode equals prefill, nothing leaks from the future, and state follows its sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import swapless
from swapless.errors import (
    CheckpointCorruptError,
    ContextError,
    NotFittedError,
    UnknownNameError,
    UnsupportedOperationError,
    UsageError,
)
from swapless.oracle import OracleCache, OracleMoeConfig, OracleMoeForCausalLM, of_size
from swapless.oracle.config import ROUTERS
from tests.oracle.conftest import END, SHAPE, build, text

pytestmark = pytest.mark.slow

COUNTS = {"195M": 190.8e6, "295M": 294.7e6, "729M": 729.3e6, "2.06B": 2.144e9}


def routed(out) -> torch.Tensor:
    return torch.stack(out.expert_ids)


@torch.no_grad()
def decode(model: OracleMoeForCausalLM, ids: torch.Tensor, prompt: int, mask: torch.Tensor | None = None):
    """Logits and expert ids (L, B, T, K), the prompt at once and then token by token."""
    B, T = ids.shape
    cache, logits, experts = OracleCache(model.config), [], []
    for begin, end in ((0, prompt), *((t, t + 1) for t in range(prompt, T))):
        out = model(ids[:, begin:end], attention_mask=None if mask is None else mask[:, :end], past_key_values=cache)
        logits.append(out.logits)
        experts.append(routed(out).view(len(out.expert_ids), B, end - begin, -1))
    return torch.cat(logits, dim=1), torch.cat(experts, dim=2)


@torch.no_grad()
def at_once(model: OracleMoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None):
    out = model(ids, attention_mask=mask, use_cache=False)
    return out.logits, routed(out).view(len(out.expert_ids), *ids.shape, -1)


def aligned(model: OracleMoeForCausalLM) -> OracleMoeForCausalLM:
    """The model with its weights in memory of their own.

    transformers leaves them where they lie in the file, and on some processors the products of MKL have another last bit where
    that is no multiple of 16 bytes.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("router", ["oracle", "switch"])
def test_the_sizes_of_the_paper(size, router):
    with torch.device("meta"):
        model = OracleMoeForCausalLM(of_size(size, router=router))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(COUNTS[size], rel=0.005)


def test_a_tiny_twin_fits_into_eight_megabytes():
    for router in (*ROUTERS, "dense"):
        model = OracleMoeForCausalLM(of_size("tiny", router=router))
        fp32 = sum(t.numel() * 4 for r in model.routers for t in r.state_dict().values())
        assert 2 * sum(p.numel() for p in model.parameters()) + fp32 < 8e6


@pytest.mark.parametrize("prompt", [1, 7])
def test_decode_equals_prefill(causal_model, prompt):
    ids = text(1, 60, rows=2)
    logits, experts = at_once(causal_model, ids)
    step_logits, step_experts = decode(causal_model, ids, prompt)
    assert torch.equal(step_experts, experts)
    assert torch.allclose(step_logits, logits, atol=1e-4)
    assert len(experts.unique()) > 2


def test_later_tokens_never_change_earlier_experts(causal_model):
    rng = np.random.default_rng(0)
    for trial in range(10):
        ids = text(trial, 48)
        cut = int(rng.integers(1, 47))
        other = ids.clone()
        other[:, cut:] = torch.from_numpy(rng.integers(3, SHAPE["vocab_size"], 48 - cut))
        before, after = at_once(causal_model, ids)[1], at_once(causal_model, other)[1]
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])


def test_the_whole_group_mean_of_the_paper_leaks():
    model = build("oracle-paper", epsilon=0.001)
    rng = np.random.default_rng(0)
    leaks = 0
    for trial in range(20):
        ids = text(trial, 48)
        other = ids.clone()
        other[:, 24:] = torch.from_numpy(rng.integers(3, SHAPE["vocab_size"], 24))
        leaks += not torch.equal(at_once(model, ids)[1][:, :, :24], at_once(model, other)[1][:, :, :24])
    assert leaks > 5


def test_a_document_starts_afresh_after_the_token_that_ends_one():
    """With the attention shut off, a document routes as it would alone."""
    for router in ("oracle", "prefix-mean", "hash-document", "theme-gate"):
        model = build(router)
        for block in model.model.layers:
            torch.nn.init.zeros_(block.attention.out_proj.weight)
        torch.nn.init.zeros_(model.model.embed_positions.weight)
        first, second = text(5, 20), text(6, 21)[:, 9:]
        first[:, -1], second[:, :] = END, second[:, :].clamp(min=3)
        joined = at_once(model, torch.cat([first, second], dim=1))[1][:, :, 20:]
        if router in ("oracle", "theme-gate"):
            states = model(torch.cat([first, second], dim=1), use_cache=True).past_key_values.routers
            assert all(set(s["gid"][0, :20].tolist()).isdisjoint(s["gid"][0, 20:].tolist()) for s in states)
        else:
            assert torch.equal(joined, at_once(model, second)[1])


def test_padding_on_the_left_changes_nothing(causal_model):
    short, long = text(3, 30), text(4, 44)
    ids = torch.cat([torch.cat([torch.zeros((1, 14), dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(ids)
    mask[0, :14] = 0
    logits, experts = at_once(causal_model, ids, mask)
    for row, alone in ((0, short), (1, long)):
        alone_logits, alone_experts = at_once(causal_model, alone)
        assert torch.equal(experts[:, row : row + 1, -alone.shape[1] :], alone_experts)
        assert torch.allclose(logits[row : row + 1, -alone.shape[1] :], alone_logits, atol=1e-4)
    step_logits, step_experts = decode(causal_model, ids, 20, mask)
    assert torch.equal(step_experts[:, 0, 14:], experts[:, 0, 14:]) and torch.equal(step_experts[:, 1], experts[:, 1])
    assert torch.allclose(step_logits[1], logits[1], atol=1e-4)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = aligned(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OracleMoeConfig)
    ids = text(2, 40)
    assert torch.equal(at_once(again, ids)[0], at_once(model, ids)[0])


def test_the_routers_stay_in_single_precision(tmp_path):
    model = build("oracle")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(a.space.centroids, b.space.centroids) for a, b in zip(half.routers, model.routers, strict=True))


def test_offloaded_equals_resident(causal_model, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        causal_model.save_pretrained(tmp_path)
        ids = text(2, 24, rows=2)
        resident = aligned(AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager"))
        expected = resident.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        with swapless.load(tmp_path, resident=0.25) as offloaded, torch.no_grad():
            assert torch.equal(offloaded(ids).logits, resident(ids).logits)
            found = offloaded.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert torch.equal(found, expected)
            trace = offloaded.swapless.trace()
        assert trace.header.top_k == 1 and trace.header.moe_blocks == (1, 2, 3)
    finally:
        torch.set_num_threads(threads)


def test_a_checkpoint_without_its_space_is_refused(tmp_path):
    model = OracleMoeForCausalLM(of_size("tiny", router="oracle", **SHAPE)).eval()
    with pytest.raises(NotFittedError, match="swapless oracle fit"):
        model(text(0, 8))
    from safetensors.torch import load_file, save_file

    build("oracle").save_pretrained(tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if ".router." not in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointCorruptError, match="centroids"):
        swapless.load(tmp_path, resident=0.5)
    with pytest.raises(NotFittedError):
        AutoModelForCausalLM.from_pretrained(tmp_path).eval()(text(0, 8))


def test_beams_and_samples_take_their_state_along():
    model = build("oracle")
    ids = text(8, 20)
    options = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, **options)
    torch.manual_seed(0)
    samples = model.generate(ids, num_return_sequences=3, do_sample=True, **options)
    for row in (*beams, *samples):
        assert torch.equal(decode(model, row[None], 20)[1], at_once(model, row[None])[1])
    without = model.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, use_cache=False, **options)
    assert torch.equal(without, beams)


def test_eager_attention_and_sdpa_agree(tmp_path):
    build("theme-gate").save_pretrained(tmp_path)
    ids = text(8, 30)
    outs = [
        at_once(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=a).eval(), ids) for a in ("eager", "sdpa")
    ]
    assert torch.allclose(outs[0][0], outs[1][0], atol=1e-4) and torch.equal(outs[0][1], outs[1][1])


def test_what_cannot_be_is_refused():
    with pytest.raises(UnknownNameError, match="theme-gate"):
        of_size("tiny", router="themegate")
    with pytest.raises(UnknownNameError, match="295M"):
        of_size("300M")
    for wrong in (
        {"moe_blocks": [4]},
        {"num_experts_per_tok": 9},
        {"group_fraction": 0.0},
        {"theme_tokens": 0.5},
        {"num_attention_heads": 3},
    ):
        with pytest.raises(UsageError):
            of_size("tiny", **wrong)
    model = build("switch")
    with pytest.raises(ContextError, match="96"):
        model(text(0, 97))
    with pytest.raises(UsageError, match="OracleCache"):
        model(text(0, 4), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(UsageError):
        model()
    cache = model(text(0, 4), use_cache=True).past_key_values
    with pytest.raises(UnsupportedOperationError):
        cache.crop(1)
