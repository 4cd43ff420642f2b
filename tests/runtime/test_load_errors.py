"""``load`` refuses what cannot work with a typed error that says what is wrong and what to do, before it loads anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import swapless
from swapless.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    UnitError,
    UnknownNameError,
    UnsupportedCheckpointError,
    UnsupportedFamilyError,
    UsageError,
)


def configure(folder: Path, **changes: Any) -> Path:
    """Change ``config.json``; None removes a key."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.fixture
def own_qwen3_moe(qwen3_moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen3_moe, tmp_path / "qwen3_moe"))


def test_an_unknown_policy_suggests_the_closest(olmoe: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"policy 'lur'.*lfu, .*lru.*Did you mean 'lru'\?"):
        swapless.load(olmoe, resident=0.5, policy="lur")
    with pytest.raises(KeyError):
        swapless.load(olmoe, resident=0.5, policy="nonsense")


def test_memory_and_resident_exclude_each_other(olmoe: Path) -> None:
    with pytest.raises(UsageError, match=r"either memory or resident.*'8GiB'.*0\.5"):
        swapless.load(olmoe, memory="8GiB", resident=0.5)


@pytest.mark.parametrize("memory", ["8G", "8", "lots", "-1GiB"])
def test_sizes_say_their_unit(olmoe: Path, memory: str) -> None:
    with pytest.raises(UnitError, match=r"GiB|unit"):
        swapless.load(olmoe, memory=memory)


@pytest.mark.parametrize("resident", [0, -0.5, 1.5, "0%", "150%", "half"])
def test_shares_lie_between_none_and_all(olmoe: Path, resident: Any) -> None:
    with pytest.raises(UnitError):
        swapless.load(olmoe, resident=resident)


@pytest.mark.parametrize("context", [0, -3, 257])
def test_a_context_that_the_model_does_not_have(olmoe: Path, context: int) -> None:
    with pytest.raises(UsageError, match=rf"context does not fit.*{context} tokens.*1 to 256"):
        swapless.load(olmoe, resident=0.5, context=context)


@pytest.mark.parametrize("dtype", ["int8", "bf17", "Tensor"])
def test_an_unknown_dtype(olmoe: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match=rf"dtype.*{dtype}.*bfloat16, float16, float32"):
        swapless.load(olmoe, resident=0.5, dtype=dtype)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "compressed-tensors"])
def test_a_quantised_checkpoint_names_its_method(own_olmoe: Path, method: str) -> None:
    configure(own_olmoe, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedCheckpointError, match=rf"quantised with '{method}'.*unquantised"):
        swapless.load(own_olmoe, resident=0.5)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedCheckpointError, match=r"\.gguf.*safetensors"):
        swapless.load(tmp_path / "model.gguf", resident=0.5)


def test_weights_as_bin_only(own_olmoe: Path) -> None:
    for file in own_olmoe.glob("*.safetensors*"):
        file.unlink()
    (own_olmoe / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedCheckpointError, match=r"\.bin.*save_pretrained"):
        swapless.load(own_olmoe, resident=0.5)


def test_remote_code_is_not_run(own_olmoe: Path) -> None:
    configure(own_olmoe, model_type="my_own", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (own_olmoe / "modeling_mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedFamilyError, match=r"own code.*'my_own'.*not run"):
        swapless.load(own_olmoe, resident=0.5)


def test_a_model_type_that_nobody_knows(own_olmoe: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"not know this model type.*'unheard_of'"):
        swapless.load(configure(own_olmoe, model_type="unheard_of"), resident=0.5)
    with pytest.raises(UnsupportedFamilyError):
        swapless.load(configure(own_olmoe, model_type=None), resident=0.5)


def test_a_configuration_that_makes_no_sense(own_olmoe: Path) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"config\.json"):
        swapless.load(configure(own_olmoe, num_hidden_layers="three"), resident=0.5)


def change_tensors(folder: Path, change: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_an_expert_is_missing(own_qwen3_moe: Path) -> None:
    change_tensors(own_qwen3_moe, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointCorruptError, match=r"every expert exactly once.*7 experts.*8 experts"):
        swapless.load(own_qwen3_moe, resident=0.5)


def test_all_experts_of_a_layer_are_missing(own_qwen3_moe: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".layers.2.mlp.experts." in key]:
            del tensors[key]

    with pytest.raises(CheckpointCorruptError, match=r"layers\.2\.mlp\.experts"):
        swapless.load(change_tensors(own_qwen3_moe, drop), resident=0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[:-1].clone(),
        lambda tensor: tensor.T.contiguous(),
        lambda tensor: tensor.reshape(-1)[: tensor.numel() // 2].clone(),
    ],
    ids=["one row less", "transposed", "half"],
)
def test_an_expert_of_the_wrong_shape(own_qwen3_moe: Path, change: Any) -> None:
    change_tensors(own_qwen3_moe, lambda tensors: tensors.update({EXPERT: change(tensors[EXPERT])}))
    with pytest.raises(CheckpointCorruptError, match=r"different shapes.*experts\.3\.up_proj"):
        swapless.load(own_qwen3_moe, resident=0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_all_experts_of_another_shape(own_qwen3_moe: Path, fused: bool, eager: Any) -> None:
    if fused:
        eager(own_qwen3_moe).save_pretrained(own_qwen3_moe, save_original_format=False)

    def transpose(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".layers.1.mlp.experts" in key and "down_proj" in key]:
            tensors[key] = tensors[key].transpose(-1, -2).contiguous()

    with pytest.raises(CheckpointCorruptError, match=r"wrong shape.*layers\.1\.mlp\.experts\.down_proj"):
        swapless.load(change_tensors(own_qwen3_moe, transpose), resident=0.5)


def test_one_matrix_of_every_expert_is_missing(own_qwen3_moe: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".layers.1.mlp.experts" in key and "up_proj" in key]:
            del tensors[key]

    with pytest.raises(CheckpointCorruptError, match=r"wrong shape.*layers\.1\.mlp\.experts\.gate_up_proj"):
        swapless.load(change_tensors(own_qwen3_moe, drop), resident=0.5)


def test_an_expert_of_whole_numbers(own_qwen3_moe: Path) -> None:
    import torch

    change_tensors(own_qwen3_moe, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.int16)}))
    with pytest.raises(CheckpointCorruptError, match="I16"):
        swapless.load(own_qwen3_moe, resident=0.5)


def test_a_weight_beside_the_experts_is_missing(own_qwen3_moe: Path) -> None:
    change_tensors(own_qwen3_moe, lambda tensors: tensors.pop("model.layers.0.mlp.gate.weight"))
    with pytest.raises(CheckpointCorruptError, match=r"layers\.0\.mlp\.gate\.weight"):
        swapless.load(own_qwen3_moe, resident=0.5)


def test_a_weight_beside_the_experts_has_the_wrong_shape(own_qwen3_moe: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-2].clone()

    with pytest.raises(CheckpointCorruptError, match=r"norm\.weight"):
        swapless.load(change_tensors(own_qwen3_moe, cut), resident=0.5)


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="cannot be read"):
        swapless.load(tmp_path / "nowhere", resident=0.5)
    with pytest.raises(CheckpointMissingError, match="'no-such-model'"):
        swapless.load("no-such-model", resident=0.5, local_files_only=True)


def test_nothing_is_left_running_by_a_refused_load(own_qwen3_moe: Path) -> None:
    import threading

    before = set(threading.enumerate())
    change_tensors(own_qwen3_moe, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointCorruptError):
        swapless.load(own_qwen3_moe, resident=0.5)
    # Not their number: a thread of an earlier test may end meanwhile, and would hide or feign one that is left.
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=30)  # transformers tells the threads of its own pool to end and does not wait for it
    assert not [thread for thread in left if thread.is_alive()]
