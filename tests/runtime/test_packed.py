"""The engine on packed stores: 16 bits lose no bit, fewer bits give the same output whatever is resident, and cost little."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swapless import embedded
from swapless.errors import CheckpointCorruptError, PackMismatchError, ReadError, UsageError
from swapless.runtime import describe
from swapless.runtime.packing import pack
from swapless.store.manifest import sealed
from swapless.store.packed import MANIFEST, read_manifest
from tests.rounded import rounded_inputs
from tests.runtime.conftest import SHAPE

AGREE = 0.02
"""Prefill against decode, the largest difference of logits over their standard deviation, in bf16."""

TEXT = (
    "Once upon a time, there was a little boy named Tim. Tim had a red ball and he loved to play with it in the park. One day, "
    "Tim saw a big dog near the tree. The dog was sad because it had lost its bone. Tim wanted to help the dog. They looked "
    "under the bench and behind the tree, but they could not find the bone. Then Tim saw something white in the grass. It was "
    "the bone! The dog was very happy and wagged its tail. Tim and the dog became good friends. They played with the red ball "
    "until it was dark. Then Tim's mom called him to come home for dinner. Tim said goodbye to the dog and ran home. He told "
    "his mom about his new friend, and she smiled and gave him a big hug."
)


@pytest.fixture(scope="module")
def stores(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The tiny Qwen3-MoE packed in 16, 8 and 4 bits."""
    root = tmp_path_factory.mktemp("stores")
    for bits in (16, 8, 4):
        pack(qwen3_moe, root / str(bits), bits=bits)
    return {bits: root / str(bits) for bits in (16, 8, 4)}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[0]


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits token by token, each with the cache of those before it: float32 (tokens, vocabulary)."""
    cache, rows = None, []
    for token in ids[0]:
        out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def test_16_bits_lose_no_bit(stores: dict[int, Path], qwen3_moe: Path, load: Any, prompt: Any, generate: Any) -> None:
    plain, packed = load(qwen3_moe), load(stores[16])
    assert torch.equal(logits(plain, prompt), logits(packed, prompt))
    assert torch.equal(generate(plain, prompt), generate(packed, prompt))
    counts = packed.swapless.stats()
    assert counts.reads and counts.bytes_read == counts.reads * packed.swapless.budget.slot_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_output_does_not_depend_on_what_is_resident(
    bits: int, stores: dict[int, Path], load: Any, prompt: Any, generate: Any
) -> None:
    models = [load(stores[bits], resident=share) for share in (1.0, 0.25, 1 / 24)]
    assert len({tuple(generate(model, prompt)[0].tolist()) for model in models}) == 1
    first, *others = (decoded(model, prompt) for model in models)
    assert all(torch.equal(first, other) for other in others)
    assert models[2].swapless.stats().waves > models[0].swapless.stats().waves


@pytest.mark.parametrize("bits", [8, 4])
def test_prefill_and_decode_agree(bits: int, stores: dict[int, Path], load: Any) -> None:
    ids = torch.randint(3, SHAPE.vocabulary, (1, 60), generator=torch.Generator().manual_seed(6))
    model = load(stores[bits])  # 60 tokens, 2 of 8 experts: some experts get many at once, in decode none does
    whole = logits(model, ids).float()
    steps = decoded(model, ids)
    close = ((whole - steps).abs().amax(dim=1) / whole.std()) < AGREE
    assert close.float().mean() > 0.9, "a flipped route may move single tokens"


@pytest.mark.parametrize("bits", [8, 4])
def test_float32_agrees_closely(bits: int, stores: dict[int, Path], load: Any) -> None:
    ids = torch.randint(3, SHAPE.vocabulary, (1, 60), generator=torch.Generator().manual_seed(6))
    model = load(stores[bits], dtype="float32")
    whole = logits(model, ids)
    assert ((whole - decoded(model, ids)).abs().max() / whole.std()) < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_change_no_bit_of_the_experts(bits: int, stores: dict[int, Path], load: Any) -> None:
    model = load(stores[bits], resident=1.0)
    module = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.experts"))
    hidden = torch.randn(3, SHAPE.hidden_size, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[0, 3], [5, 3], [7, 0]]), torch.rand(3, 2, dtype=torch.bfloat16)
    one = module(hidden, ids, weights)
    torch.set_num_threads(3)
    assert torch.equal(module(hidden, ids, weights), one)


@pytest.fixture(scope="module", params=[8, 4])
def all_rounded(request: pytest.FixtureRequest, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in 8 bits and all linear layers too, or in 4."""
    folder = tmp_path_factory.mktemp("dense") / "store"
    pack(qwen3_moe, folder, bits=8, dense_bits=request.param)
    return folder


def test_rounded_linear_layers_give_what_their_rounded_weights_give(
    all_rounded: Path, stores: dict[int, Path], load: Any
) -> None:
    ids = torch.randint(3, SHAPE.vocabulary, (1, 40), generator=torch.Generator().manual_seed(6))
    rounded, plain = load(all_rounded, dtype="float32"), load(stores[8], dtype="float32")
    linears = [entry["module"] for entry in read_manifest(all_rounded).dense.values()]
    attention = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(SHAPE.num_moe_layers) for part in "qkvo"]
    assert sorted(linears) == sorted([*attention, "lm_head"]), "neither router nor embedding"
    before = logits(plain, ids)
    for path in linears:
        with torch.no_grad():
            plain.get_submodule(path).weight.copy_(rounded.get_submodule(path).weight)
        plain.get_submodule(path).register_forward_pre_hook(lambda module, given: rounded_inputs(given[0]).float())
    expected = logits(plain, ids)
    for got in (logits(rounded, ids), decoded(rounded, ids)):
        assert (got - expected).abs().max() / expected.std() < 1e-4
    assert (before - expected).abs().max() / expected.std() > 1e-3, "nothing was rounded"


def test_rounded_linear_layers_take_less_of_the_budget(all_rounded: Path, stores: dict[int, Path], load: Any) -> None:
    manifest = read_manifest(all_rounded)
    saved = describe(stores[8]).non_expert_bytes - describe(all_rounded).non_expert_bytes
    assert saved == sum(
        2 * int(np.prod(entry["shape"])) - manifest.dense_layout(key).nbytes for key, entry in manifest.dense.items()
    )
    assert load(all_rounded).swapless.budget.parts["non_expert"] == describe(all_rounded).non_expert_bytes


def test_the_budget_counts_blocks_and_no_bounce_buffers(stores: dict[int, Path], load: Any) -> None:
    for bits in (16, 8, 4):
        model, manifest = load(stores[bits]), read_manifest(stores[bits])
        budget = model.swapless.budget
        assert budget.slot_bytes == max(layer.block_bytes for layer in manifest.moe_layers)
        assert budget.parts["io_buffers"] == 0
        assert budget.parts["slots"] == budget.slots * budget.slot_bytes


def test_a_flipped_byte_is_found_when_blocks_are_checked(
    stores: dict[int, Path], tmp_path: Path, load: Any, prompt: Any, generate: Any
) -> None:
    own = Path(shutil.copytree(stores[8], tmp_path / "own"))
    for layer in read_manifest(own).moe_layers:
        raw = bytearray((own / layer.file).read_bytes())
        for expert in range(layer.num_experts):
            raw[layer.data_offset + expert * layer.block_bytes + 7] ^= 1
        (own / layer.file).write_bytes(raw)
    generate(load(own, check="none"), prompt)
    for check in (None, "first", "always"):
        with pytest.raises(ReadError, match="not what was packed"):
            generate(load(own, check=check), prompt)
    outputs = [generate(load(stores[8], resident=0.25, check=check), prompt) for check in ("first", "always", "none")]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_checking_blocks_needs_a_packed_store(qwen3_moe: Path, load: Any) -> None:
    with pytest.raises(UsageError, match="packed store"):
        load(qwen3_moe, check="first")
    with pytest.raises(UsageError, match="first, always, none"):
        load(qwen3_moe, check="sometimes")
    load(qwen3_moe, check="none")


def test_an_unfinished_store_is_refused(stores: dict[int, Path], tmp_path: Path, load: Any) -> None:
    own = Path(shutil.copytree(stores[8], tmp_path / "own"))
    (own / MANIFEST).rename(own / ".swapless-pack.json")
    with pytest.raises(CheckpointCorruptError, match="not finished"):
        load(own)


def test_a_store_whose_experts_are_not_the_models_is_refused(stores: dict[int, Path], tmp_path: Path, load: Any) -> None:
    import hashlib
    import json

    own = Path(shutil.copytree(stores[8], tmp_path / "own"))
    config = json.loads((own / "config.json").read_text()) | {"num_hidden_layers": SHAPE.num_moe_layers - 1}
    text = json.dumps(config).encode()
    (own / "config.json").write_bytes(text)
    manifest = json.loads((own / MANIFEST).read_text())
    manifest["files"]["config.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (own / MANIFEST).write_bytes(sealed({key: value for key, value in manifest.items() if key != "checksum"}))
    with pytest.raises(PackMismatchError, match="other experts"):
        load(own)


def test_16_bits_are_not_converted(stores: dict[int, Path], load: Any) -> None:
    with pytest.raises(UsageError, match="not converted"):
        load(stores[16], dtype="float32")


def test_describe_tells_the_precision(stores: dict[int, Path], qwen3_moe: Path) -> None:
    whole, packed = describe(qwen3_moe), describe(stores[4])
    assert packed.layout == "packed, 4 bits" and packed.num_experts == whole.num_experts
    assert packed.expert_bytes == read_manifest(stores[4]).moe_layers[0].block_bytes
    assert packed.non_expert_bytes == whole.non_expert_bytes
    blocks = SHAPE.num_moe_layers * SHAPE.num_experts * packed.expert_bytes
    assert packed.total_bytes == packed.non_expert_bytes + blocks


def perplexity(rows: torch.Tensor, ids: torch.Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(rows[:-1], ids[0, 1:]).item())


@pytest.mark.slow
def test_decode_perplexity_of_the_embedded_model(tmp_path: Path, load: Callable[..., Any]) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(embedded.path())(TEXT, return_tensors="pt")["input_ids"]
    whole = perplexity(decoded(load(embedded.path(), resident=1.0, context=512), ids), ids)
    for bits, bound in ((8, 0.005), (4, 0.05)):
        pack(embedded.path(), tmp_path / str(bits), bits=bits)
        packed = perplexity(decoded(load(tmp_path / str(bits), resident=1.0, context=512), ids), ids)
        assert packed / whole - 1 < bound, f"{bits} bits: {packed:.4f} against {whole:.4f}"
