"""FP8 whose rows and columns are no multiple of the block: equal, bit for bit, to a checkpoint of the weights made whole.

The whole weights are made here, a number by the scale of its own block, by nothing that the project or transformers uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swapless import runtime
from swapless.errors import CheckpointCorruptError
from swapless.runtime.door import fp8, match
from swapless.runtime.packing import pack

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of small models in bf16, a tensor an expert, by family."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

    configs: dict[str, Any] = {
        "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, head_dim=16, num_experts=4, decoder_sparse_step=1),
        "deepseek_v3": lambda: DeepseekV3Config(**COMMON | LATENT),
    }
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model = AutoModelForCausalLM.from_config(configs[family]())
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() >= 2:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            made[family] = tmp_path_factory.mktemp(family) / family
            model.to(torch.bfloat16).save_pretrained(made[family])
        return made[family]

    return make


def quantise(weight: torch.Tensor, block: tuple[int, int], kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored values, stored scales and the weights that they stand for; ``kind`` is how the scales are stored."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :columns] = weight.float()
    scales = padded.reshape(down, block[0], across, block[1]).abs().amax((1, 3)) / 448
    scales *= 1 + torch.arange(scales.numel()).reshape(scales.shape) % 3  # of blocks that are neighbours never the same
    if kind in ("ue8m0", "bytes"):
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = scales.to(torch.bfloat16).float() if kind == "bf16" else scales
    of_each = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    values = (weight.float() / of_each).clamp(-448, 448).to(torch.float8_e4m3fn)
    whole = (values.float() * of_each).to(torch.bfloat16)
    stored = {
        "f32": lambda: scales,
        "bf16": lambda: scales.to(torch.bfloat16),
        "ue8m0": lambda: scales.to(torch.float8_e8m0fnu),
        "bytes": lambda: (torch.log2(scales) + 127).to(torch.uint8),
        "a number": lambda: scales.reshape(()),
        "one number": lambda: scales.reshape(1),
    }[kind]()
    return values, stored, whole


Change = Callable[[dict[str, torch.Tensor]], object]


def make_fp8(
    source: Path,
    folder: Path,
    block: tuple[int, int],
    kind: str = "f32",
    stated: Any = "as it is",
    change: Change | None = None,
) -> tuple[Path, Path]:
    """A folder in FP8 and one of the weights that it stands for."""
    quantised, whole = {}, {}
    for key, value in load_file(source / "model.safetensors").items():
        if key.endswith("_proj.weight") or "_proj_with_mqa" in key:
            size = tuple(value.shape) if kind.endswith("number") else block
            quantised[key], quantised[f"{key}_scale_inv"], whole[key] = quantise(value, size, kind)
        else:
            quantised[key] = whole[key] = value
    if change is not None:
        change(quantised)
    config = json.loads((source / "config.json").read_text())
    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if stated != "absent":
        settings["weight_block_size"] = list(block) if stated == "as it is" else stated
    for name, tensors, extra in (("fp8", quantised, {"quantization_config": settings}), ("whole", whole, {})):
        (folder / name).mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config | extra))
    return folder / "fp8", folder / "whole"


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def further_layer(tensors: dict[str, torch.Tensor]) -> None:
    """Layers for predicting several tokens, and scales of activations, as published checkpoints have them beside the rest."""
    for key, value in list(tensors.items()):
        if key.startswith("model.layers.1."):
            tensors[key.replace("layers.1.", "layers.2.")] = value.clone()
        if key.endswith("down_proj.weight"):
            tensors[key.replace(".weight", ".activation_scale")] = torch.ones(())


def short_names(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith(".weight_scale_inv")]:
        tensors[key.replace(".weight_scale_inv", ".scale")] = tensors.pop(key)


CASES = {
    "rows left over": ("qwen3_moe", (16, 16), "f32", "as it is", None),
    "rows and columns left over": ("qwen3_moe", (20, 28), "f32", "as it is", None),
    "blocks that are no squares": ("qwen3_moe", (7, 32), "f32", "as it is", None),
    "scales in bf16": ("qwen3_moe", (16, 20), "bf16", "as it is", None),
    "scales in e8m0": ("qwen3_moe", (16, 20), "ue8m0", "as it is", None),
    "scales as bytes": ("qwen3_moe", (16, 20), "bytes", "as it is", None),
    "no block size said": ("qwen3_moe", (128, 128), "f32", "absent", None),
    "one scale a weight": ("qwen3_moe", (1, 1), "a number", None, None),
    "one scale a weight, as a list of one": ("qwen3_moe", (1, 1), "one number", None, None),
    "scales of a short name": ("qwen3_moe", (16, 20), "f32", "as it is", short_names),
    "a latent projection of 28 rows": ("deepseek_v3", (16, 16), "f32", "as it is", None),
    "further layers and scales": ("deepseek_v3", (16, 20), "f32", "as it is", further_layer),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_gives_the_bits_of_the_weights_made_whole(
    case: Any, plain: Any, tmp_path: Path, prompt: torch.Tensor, load: Any, eager: Any
) -> None:
    family, block, kind, stated, change = case
    quantised, whole = make_fp8(plain(family), tmp_path, block, kind, stated, change)
    assert torch.equal(logits(load(quantised, resident=0.5), prompt), logits(eager(whole), prompt))
    assert all(layer.identical and layer.experts_compared == 4 for layer in runtime.verify(quantised))


def test_it_is_packed_with_the_same_bits(plain: Any, tmp_path: Path, prompt: torch.Tensor, load: Any, eager: Any) -> None:
    quantised, whole = make_fp8(plain("qwen3_moe"), tmp_path, (16, 20))
    pack(quantised, tmp_path / "store", bits=16)
    assert torch.equal(logits(load(tmp_path / "store"), prompt), logits(eager(whole), prompt))


@pytest.mark.parametrize(
    "fault", ["a wrong scale", "a neighbour's scale", "the whole weight's first scale", "experts exchanged"]
)
def test_verify_finds_what_is_planted_in_the_read_path(
    fault: str, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, _ = make_fp8(plain("qwen3_moe"), tmp_path, (16, 16))
    widen, collect = fp8.widen, match.checkpoint_layout

    def wrong(stored: torch.Tensor, scales: torch.Tensor, block: Any, dtype: torch.dtype) -> torch.Tensor:
        if stored.is_meta:
            return widen(stored, scales, block, dtype)
        scales = scales.clone()
        if fault == "a wrong scale":
            scales[-1, -1] *= 1.25
        elif fault == "a neighbour's scale":
            scales[0] = scales[-1].clone()
        else:
            scales[:] = scales[0, 0].clone()
        return widen(stored, scales, block, dtype)

    def exchanged(*arguments: Any) -> Any:
        layout = collect(*arguments)
        for origin in layout.moe_layers[1].origins.values():
            for refs in origin.refs.values():
                refs[0], refs[1] = refs[1], refs[0]
        return layout

    if fault == "experts exchanged":
        monkeypatch.setattr(runtime.open, "checkpoint_layout", exchanged)
    else:
        monkeypatch.setattr(fp8, "widen", wrong)
    assert not all(layer.identical for layer in runtime.verify(quantised))


WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
DENSE = "model.layers.0.self_attn.k_proj.weight"


def reshaped(key: str, shape: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{key}_scale_inv"] = shape(tensors[f"{key}_scale_inv"])

    return change


def gone(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


WRONG = {
    "an expert's scales, a column short": (reshaped(WEIGHT, lambda scales: scales[:, :-1]), f"scales.*{WEIGHT}_scale_inv"),
    "an expert's scales, a row more": (reshaped(WEIGHT, lambda s: torch.cat([s, s[:1]])), f"scales.*{WEIGHT}_scale_inv"),
    "an expert's scales, as if of half the block": (
        reshaped(WEIGHT, lambda scales: scales.repeat_interleave(2, 1)),
        f"scales.*{WEIGHT}_scale_inv",
    ),
    "a linear layer's scales, transposed": (reshaped(DENSE, lambda scales: scales.mT), f"scales.*{DENSE}_scale_inv"),
    "a linear layer's scales, one for all": (reshaped(DENSE, lambda scales: scales[:1, :1]), f"scales.*{DENSE}_scale_inv"),
    "a linear layer's scales, integers": (reshaped(DENSE, lambda scales: scales.int()), f"scales.*{DENSE}_scale_inv"),
    "an expert's scales, gone": (gone(f"{WEIGHT}_scale_inv"), r"differ in number.*up_proj"),
    "a linear layer's scales, gone": (gone(f"{DENSE}_scale_inv"), f"no scales.*{DENSE}"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG.keys())
def test_scales_that_do_not_fit_are_refused_by_name(change: Change, words: str, plain: Any, tmp_path: Path, load: Any) -> None:
    quantised, _ = make_fp8(plain("qwen3_moe"), tmp_path, (16, 20), change=change)
    with pytest.raises(CheckpointCorruptError, match=words):
        load(quantised)


@pytest.mark.parametrize("block", [[16], [16, 0], [16.0, 16.0], "16", 16, [-16, 16], [True, True], {"rows": 16}], ids=str)
def test_a_block_size_that_cannot_be(block: Any, plain: Any, tmp_path: Path, load: Any) -> None:
    quantised, _ = make_fp8(plain("qwen3_moe"), tmp_path, (16, 20), stated=block)
    with pytest.raises(CheckpointCorruptError, match=r"block size.*weight_block_size"):
        load(quantised)


def test_settings_that_transformers_refuses_are_named(plain: Any, tmp_path: Path, load: Any) -> None:
    quantised, _ = make_fp8(plain("qwen3_moe"), tmp_path, (16, 20))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "nonsense"
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointCorruptError, match=r"quantisation.*nonsense"):
        load(quantised)
