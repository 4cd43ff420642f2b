"""oneDNN is set aside in steps of a single row of rounded models alone, and comes back whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swapless.runtime.packing import pack
from swapless.runtime.rows import single_rows


@pytest.fixture(scope="module")
def store(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "store"
    pack(qwen3_moe, folder, bits=8)
    return folder


class Seen:
    """Whether oneDNN was there at the output head of each call."""

    def __init__(self, model: Any) -> None:
        self.of_calls: list[bool] = []
        model.lm_head.register_forward_pre_hook(lambda *_: self.of_calls.append(torch.backends.mkldnn.enabled))


@torch.no_grad()
def prefill_then_decode(model: Any, ids: torch.Tensor) -> None:
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.fixture(autouse=True)
def found_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.backends.mkldnn.enabled
    monkeypatch.setattr("swapless.runtime.rows.onednn_slower", lambda: True)


def test_only_decode_steps_of_a_single_row_do_without(store: Path, load: Any, prompt: torch.Tensor) -> None:
    model = load(store)
    seen = Seen(model)
    prefill_then_decode(model, prompt)
    assert seen.of_calls == [True, False] and torch.backends.mkldnn.enabled
    prefill_then_decode(model, prompt.expand(2, -1))
    assert seen.of_calls == [True, False, True, True] and torch.backends.mkldnn.enabled


def test_a_model_that_loses_no_bit_is_left_alone(qwen3_moe: Path, load: Any, prompt: torch.Tensor) -> None:
    model = load(qwen3_moe)
    seen = Seen(model)
    prefill_then_decode(model, prompt)
    assert seen.of_calls == [True, True]


def test_so_is_every_model_where_onednn_is_fast(
    store: Path, load: Any, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swapless.runtime.rows.onednn_slower", lambda: False)
    model = load(store)
    seen = Seen(model)
    prefill_then_decode(model, prompt)
    assert seen.of_calls == [True, True]


def test_it_comes_back_after_a_step_that_failed(store: Path, load: Any, prompt: torch.Tensor) -> None:
    model = load(store)

    def stop(*_: Any) -> None:
        if not torch.backends.mkldnn.enabled:
            raise KeyboardInterrupt

    model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prefill_then_decode(model, prompt)
    assert torch.backends.mkldnn.enabled


def test_whoever_does_without_it_goes_on_so(store: Path, load: Any, prompt: torch.Tensor) -> None:
    model = load(store)
    seen = Seen(model)
    with single_rows():
        prefill_then_decode(model, prompt)
        assert not torch.backends.mkldnn.enabled
    assert seen.of_calls == [False, False] and torch.backends.mkldnn.enabled
