"""Checkpoints in MXFP4 (gpt-oss) and block-wise FP8 (DeepSeek, Qwen), in the tensors that they are published in.

They run and they are packed an expert at a time, with the weights that transformers itself makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swapless import runtime
from swapless.errors import CheckpointCorruptError
from swapless.runtime.open import open_checkpoint
from swapless.runtime.packing import pack
from swapless.runtime.pool import slot_bytes
from swapless.store.packed import read_manifest
from swapless.store.verify import verify_packed

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8_BLOCK = 16


def as_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, uint8 (E, rows, groups, 16), and scales, uint8 (E, rows, groups), of float weights (E, rows, columns)."""
    groups = weights.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    code = (scaled.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)


def as_fp8(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, float8 (rows, columns), and scales, float32 by block of 16 x 16."""
    rows, columns = weights.shape
    blocks = weights.float().reshape(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn), scales


def tiny_gpt_oss(folder: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = as_mxfp4(value.transpose(1, 2))
        else:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    }
    save(folder, model, tensors, quantization)


def tiny_fp8(folder: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = as_fp8(value)
        else:
            tensors[name] = value
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{block}.mlp.gate" for block in range(2))],
    }
    save(folder, model, tensors, quantization)


def save(folder: Path, model: Any, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": quantization, "dtype": "bfloat16"}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, default=str))


MAKERS = {"mxfp4": tiny_gpt_oss, "fp8": tiny_fp8}


@pytest.fixture(scope="module", params=MAKERS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    MAKERS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[0].float()


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Median over tokens of the root mean square of the difference, over the standard deviation of all."""
    return float((got - expected).square().mean(-1).sqrt().median() / expected.std())


def test_it_runs_with_the_same_bits(quantized: Path, ids: torch.Tensor, load: Any, eager: Any, generate: Any) -> None:
    reference, model = eager(quantized), load(quantized, resident=0.5)
    assert reference.dtype == model.dtype == torch.bfloat16
    assert torch.equal(logits(model, ids), logits(reference, ids))
    assert torch.equal(generate(model, ids), generate(reference, ids))


def test_verify_holds_it_against_transformers(quantized: Path) -> None:
    layers = list(runtime.verify(str(quantized)))
    assert len(layers) == 2 and all(layer.identical and layer.experts_compared == 4 for layer in layers)


@pytest.mark.few(2)
@pytest.mark.parametrize("bits,bound", [(16, 0.0), (8, 0.03), (4, 0.4)])
def test_it_is_packed(
    bits: int, bound: float, quantized: Path, ids: torch.Tensor, load: Any, eager: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    manifest = pack(quantized, store, bits=bits)
    assert manifest == read_manifest(store) and all(holds for _, _, holds in verify_packed(store))
    kept = load_file(store / "model.safetensors")
    assert not [name for name in kept if ".experts." in name and "bias" not in name]
    got, expected = logits(load(store, resident=0.5), ids), logits(eager(quantized), ids)
    assert distance(got, expected) <= bound
    assert bits < 16 or torch.equal(got, expected)


def test_linear_layers_that_are_not_quantised_take_8_bits(
    quantized: Path, ids: torch.Tensor, load: Any, tmp_path: Path
) -> None:
    manifest = pack(quantized, tmp_path / "store", bits=8, dense_bits=8)
    modules = {entry["module"] for entry in manifest.dense.values()}
    assert "lm_head" in modules and ("model.layers.0.self_attn.q_proj" in modules) == ("mxfp4" in quantized.name)
    pack(quantized, tmp_path / "plain", bits=8)
    got, expected = (logits(load(tmp_path / name), ids) for name in ("store", "plain"))
    assert 0 < distance(got, expected) < 0.03


def test_what_is_read_is_what_lies_on_disk_and_a_slot_holds_whole_weights(quantized: Path) -> None:
    opened = open_checkpoint(quantized)
    layer = opened.layout.moe_layers[0]
    on_disk = sum(extent.nbytes for source in layer.sources(1) for extent in source.extents)
    assert on_disk < 0.6 * layer.expert_bytes <= 0.6 * slot_bytes(opened.layout.moe_layers)
    assert {parameter.dtype for parameter in layer.parameters} == {torch.bfloat16}


def test_scales_that_are_not_there_are_missed(quantized: Path, tmp_path: Path, load: Any) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text((quantized / "config.json").read_text())
    tensors = load_file(quantized / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and "scale" in name and "down" in name]:
        del tensors[name]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointCorruptError, match="no scales"):
        load(own)
