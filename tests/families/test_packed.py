"""Every family as a packed store in 8 and 4 bits: close to plain transformers, and what its rounded weights and inputs give.

Two comparisons a family. Against eager in bf16 the logits may differ as rounding to so few bits makes them, within a stated
bound. Against eager in float32 on the very weights that the store stands for, with the experts' inputs rounded by a slow twin,
only the order of float32 sums differs, so that this bound shows every mistake in a layout, a flag, a gate or a bias.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import swapless
from swapless.runtime.door import is_experts
from tests.families.test_families import EXPERTS, FAMILIES, LEAST_FAMILIES
from tests.families.tiny import decorated_families, tiny_model
from tests.rounded import rounded_inputs

BOUND = {8: 0.03, 4: 0.4}
"""Difference of prefill logits from eager's in bf16, over the logits' standard deviation: of half the tokens at most so much.

Of random models, whose logits are sums of independent errors: rounding to 4 bits costs a weight about 8 % of its size. The
other half may differ by more, because a router whose scores nearly tie sends some tokens elsewhere for any difference."""

EXACT_BOUND = 2e-4
"""The same, from eager in float32 on the store's own weights and rounded inputs, of half the tokens."""

STEP_BOUND = 0.01
"""Of all tokens. Sums in another order move an input that lies on the edge between two of its 255 steps to the other one. Of 64
inputs, one that is off by a 127th of the largest moves an output by about 0.25 % of its spread; a few may come together."""


class RoundedInputs(TorchFunctionMode):
    """While it is on, what is multiplied by a parameter of an experts module of ``model`` is rounded as kernels round it."""

    _PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)

    def __init__(self, model: Any) -> None:
        super().__init__()
        experts = [module for module in model.modules() if is_experts(module)]
        self._storages = {p.untyped_storage().data_ptr() for module in experts for p in module.parameters(recurse=False)}
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS and args[1].untyped_storage().data_ptr() in self._storages:
            self.calls += 1
            args = (rounded_inputs(args[0]).to(args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))


def rounded(model: Any, folder: Path) -> Any:
    """``model`` with the weights that the packed store in ``folder`` stands for."""
    from swapless.store.packed import PackedStore, read_manifest
    from swapless.store.quantize import dequantize
    from swapless.store.read import aligned_buffer

    manifest = read_manifest(folder)
    store = PackedStore(folder, manifest.moe_layers, check=True)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for moe_layer, layer in enumerate(manifest.moe_layers):
            module, block = modules[layer.path], aligned_buffer(layer.block_bytes)
            for expert in range(layer.num_experts):
                store.read_part(moe_layer, expert, 0, block, block[:0])
                parts: dict[str, list[np.ndarray]] = {}
                for piece in layer.pieces:
                    if piece.bits < 16:
                        held = block[piece.offset : piece.offset + piece.nbytes]
                        parts.setdefault(piece.name, []).append(dequantize(held, manifest.layout(piece)))
                for name, rows in parts.items():
                    weights = torch.from_numpy(np.concatenate(rows))
                    getattr(module, name)[expert] = weights.T if module.is_transposed else weights
    store.close()
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Path]]:
    family = decorated_families()[request.param]
    folder = tmp_path_factory.mktemp(family.name) / "checkpoint"
    model = tiny_model(family).to(torch.bfloat16)
    model.save_pretrained(folder, save_original_format=FAMILIES.index(family.name) % 2 == 0)
    yield family.name, type(model), folder
    shutil.rmtree(folder.parent)


def distance(got: Any, expected: Any) -> float:
    """Root mean square of the difference over the standard deviation of what is expected."""
    return float((got.float() - expected.float()).square().mean().sqrt() / expected.float().std())


def middle_distance(got: Any, expected: Any) -> float:
    """Median over tokens (rows) of the root mean square of the difference, over the standard deviation of all."""
    rows = (got.float() - expected.float()).square().mean(dim=-1).sqrt()
    return float(rows.median() / expected.float().std())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_family_packed(saved: tuple[str, Any, Path], bits: int, swept_packed: dict[str, list[int]]) -> None:
    from swapless.runtime.packing import pack
    from tests.families.compare import prompts, reference, run

    name, cls, folder = saved
    store = folder.parent / f"int{bits}"
    pack(folder, store, bits=bits)
    given = prompts(left_padded=FAMILIES.index(name) % 2 == 1)

    @torch.no_grad()
    def logits(model: Any) -> Any:
        return model(input_ids=given.ids, attention_mask=given.mask).logits[given.mask.bool()]

    with swapless.load(store, resident=2 / EXPERTS, context=64) as model:
        packed = run(model, given)
        stats = model.swapless.stats()
    whole = logits(reference(folder, cls))
    assert packed.prefill.dtype == whole.dtype and stats.hits < stats.requests
    assert middle_distance(packed.prefill, whole) < BOUND[bits]

    plain = rounded(cls.from_pretrained(folder, experts_implementation="eager", dtype=torch.float32).eval(), store)
    with swapless.load(store, resident=2 / EXPERTS, context=64, dtype="float32") as model:
        exact = run(model, given)
    with RoundedInputs(plain) as twin:
        expected = run(plain, given)
    assert twin.calls, "nothing was rounded"
    assert torch.equal(exact.tokens, expected.tokens)
    for got, wanted in ((exact.prefill, expected.prefill), (exact.steps.flatten(0, 1), expected.steps.flatten(0, 1))):
        assert middle_distance(got, wanted) < EXACT_BOUND
        assert distance(got, wanted) < STEP_BOUND
    swept_packed.setdefault(name, []).append(bits)


def test_enough_families_are_swept() -> None:
    assert len(FAMILIES) >= LEAST_FAMILIES
