"""Folders as people have them: what transformers takes is taken, and what would change the output is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, SwaplessError, UnsupportedCheckpointError
from swapless.runtime import describe
from swapless.runtime.door import model_config
from swapless.store.headers import read_config

GATE = "model.layers.1.mlp.experts.{}.gate_proj.weight"


@pytest.fixture
def folder(qwen3_moe: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint in one shard that a test may damage."""
    return Path(shutil.copytree(qwen3_moe, tmp_path / "checkpoint"))


def change(folder: Path, function: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """Change the tensors and keys of the configuration (None removes one)."""
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return configure(folder, **config)


def configure(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@torch.no_grad()
def logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    return model(prompt).logits


def test_a_stale_index_beside_the_single_file(olmoe: Path, tmp_path: Path, prompt: torch.Tensor, load: Any, eager: Any) -> None:
    from transformers import AutoModelForCausalLM

    own = Path(shutil.copytree(olmoe, tmp_path / "own"))
    newer = eager(olmoe)
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.mul_(1.25)
    newer.save_pretrained(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "model.safetensors", own)
    expected = logits(AutoModelForCausalLM.from_pretrained(own, experts_implementation="eager").eval(), prompt)
    assert not torch.equal(expected, logits(eager(olmoe), prompt))
    assert torch.equal(logits(load(own), prompt), logits(eager(own), prompt))
    for shard in own.glob("model-*"):
        shard.unlink()
    assert torch.equal(logits(load(own), prompt), logits(eager(own), prompt))


def halves(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        if "lm_head" in key or "embed" in key:
            tensors[key] = tensors[key].to(torch.float16)


def singles(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()


def integers_first(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a_counter"] = torch.tensor([3])
    tensors["a_float8"] = torch.zeros(2).to(torch.float8_e4m3fn)


DTYPES = {"as saved": lambda tensors: None, "float16 first": halves, "float32 first": singles, "integers first": integers_first}


@pytest.mark.parametrize("arranged", DTYPES.values(), ids=DTYPES.keys())
def test_without_a_dtype_it_computes_in_what_transformers_does(
    arranged: Any, folder: Path, prompt: torch.Tensor, load: Any, eager: Any
) -> None:
    change(folder, arranged, dtype=None)
    expected, model = eager(folder), load(folder)
    assert model.dtype == expected.dtype
    assert torch.equal(logits(model, prompt), logits(expected, prompt))


def test_without_a_dtype_the_index_may_say_it(own_olmoe: Path, prompt: torch.Tensor, load: Any, eager: Any) -> None:
    configure(own_olmoe, dtype=None)
    index = own_olmoe / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    assert eager(own_olmoe).dtype == load(own_olmoe).dtype == torch.bfloat16
    values["metadata"]["dtype"] = "float32"
    index.write_text(json.dumps(values))
    expected, model = eager(own_olmoe), load(own_olmoe)
    assert model.dtype == expected.dtype == torch.float32
    assert torch.equal(logits(model, prompt), logits(expected, prompt))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "nonsense", 5, ["bfloat16"]], ids=str)
def test_a_dtype_that_no_model_is_computed_in(folder: Path, dtype: Any, load: Any) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"config\.json|configuration"):
        load(configure(folder, dtype=dtype))


@pytest.mark.parametrize("family", ["granitemoehybrid", "qwen3_moe", "gpt_oss", "llama4", "nemotron_h"])
def test_a_configuration_is_read_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    values = read_config(tmp_path)
    if family == "granitemoehybrid":
        values["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
        (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = model_config(tmp_path, values), AutoConfig.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.to_dict() | {"_name_or_path": ""} == theirs.to_dict() | {"_name_or_path": ""}


def test_an_adapter_is_refused_by_name(folder: Path, load: Any) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedCheckpointError, match=r"adapter.*adapter_config\.json"):
        load(folder)


def renamed(old: int, new: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def function(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate", "up", "down"):
            key = GATE.replace("gate_proj", f"{name}_proj")
            tensors[key.format(new)] = tensors.pop(key.format(old))

    return function


def added(new: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def function(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE.format(new)] = tensors[GATE.format(0)].clone()

    return function


def of_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE.format(3)] = torch.ones_like(tensors[GATE.format(3)], dtype=torch.int32)


def twice(tensors: dict[str, torch.Tensor]) -> None:
    parts = [
        torch.stack([tensors[GATE.replace("gate_proj", f"{name}_proj").format(expert)] for expert in range(8)])
        for name in ("gate", "up")
    ]
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.cat(parts, 1)


WRONG = {
    "an expert beyond the last, in place of the last": (renamed(7, 8), r"every expert.*experts\.8\.gate_proj.*experts 0 to 7"),
    "an expert far beyond": (renamed(2, 10**12), r"every expert.*experts\.3\.gate_proj|experts\.1000000000000"),
    "an expert more": (added(8), r"every expert.*9 experts"),
    "an expert under two numbers": (renamed(7, "07"), None),
    "an expert of integers": (of_integers, r"type that cannot be computed with.*experts\.3\.gate_proj.*I32"),
    "experts one by one and fused": (twice, r"experts twice.*gate_up_proj"),
}


@pytest.mark.parametrize(("function", "words"), WRONG.values(), ids=WRONG.keys())
def test_experts_that_are_not_the_models(
    function: Any, words: str | None, folder: Path, prompt: torch.Tensor, load: Any, eager: Any
) -> None:
    change(folder, function)
    if words is None:
        assert torch.equal(logits(load(folder), prompt), logits(eager(folder), prompt))
        return
    with pytest.raises(CheckpointCorruptError, match=words):
        load(folder)


def test_integers_elsewhere_are_cast_as_in_transformers(folder: Path, prompt: torch.Tensor, load: Any, eager: Any) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    change(folder, lambda tensors: tensors.update({key: (tensors[key] * 20).round().to(torch.int8)}))
    assert torch.equal(logits(load(folder), prompt), logits(eager(folder), prompt))


def test_of_a_tensor_in_two_shards_the_last_counts_as_in_transformers(
    own_olmoe: Path, prompt: torch.Tensor, load: Any, eager: Any
) -> None:
    shards = sorted(own_olmoe.glob("model-*"))
    parts = {shard: load_file(shard) for shard in (shards[0], shards[-1])}
    first, last = parts.values()
    doubled = {key: value * 2 for key, value in first.items() if "layers" in key}
    save_file(last | doubled, shards[-1], metadata={"format": "pt"})
    assert doubled
    assert torch.equal(logits(load(own_olmoe), prompt), logits(eager(own_olmoe), prompt))


def test_layers_beyond_the_configuration_are_noted(folder: Path, prompt: torch.Tensor, load: Any, eager: Any) -> None:
    configure(folder, num_hidden_layers=2)
    model = load(folder)
    assert torch.equal(logits(model, prompt), logits(eager(folder), prompt))
    note = next(note for note in model.swapless.budget.warnings if "not part of the model" in note)
    assert "layers up to 2" in note and "has 2 (0 to 1)" in note
    assert note in describe(folder).notes


def test_a_whole_checkpoint_has_no_notes(folder: Path) -> None:
    assert describe(folder).notes == ()


def test_more_experts_a_token_than_there_are(folder: Path, load: Any) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"more experts than a MoE layer has.*9 of 8"):
        load(configure(folder, num_experts_per_tok=9))


def test_a_vocabulary_of_one(folder: Path, load: Any, eager: Any) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[key] = tensors[key][:1]

    change(folder, cut, vocab_size=1, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    ids = torch.zeros((1, 5), dtype=torch.long)
    assert torch.equal(logits(load(folder), ids), logits(eager(folder), ids))


BOMBS: dict[str, dict[str, Any]] = {
    "a million layers": {"num_hidden_layers": 10**6},
    "9000 layers": {"num_hidden_layers": 9000},
    "a million heads": {"num_attention_heads": 10**6},
    "heads of 10^9 values": {"head_dim": 10**9},
    "a thousand million labels": {"num_labels": 10**9},
    "a hidden size of 10^9": {"hidden_size": 10**9},
    "a vocabulary of 10^9": {"vocab_size": 10**9},
    "2^62 experts": {"num_local_experts": 2**62},
    "90000 experts": {"num_local_experts": 90_000},
    "experts of 10^9 values": {"moe_intermediate_size": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "less than no layers": {"num_hidden_layers": -1},
    "no heads": {"num_attention_heads": 0},
    "less than no heads": {"num_attention_heads": -1},
    "no key heads": {"num_key_value_heads": 0},
    "key heads that do not divide": {"num_key_value_heads": 3},
    "no experts": {"num_local_experts": 0},
    "less than no experts": {"num_local_experts": -8},
    "no expert a token": {"num_experts_per_tok": 0},
    "a sparse step of 0": {"decoder_sparse_step": 0},
    "a word for a number": {"hidden_size": "wide"},
    "a fraction for a number": {"num_hidden_layers": 2.5},
    "a list for a number": {"num_local_experts": [8]},
    "an unknown activation": {"hidden_act": "frobnicate"},
    "a list for an activation": {"hidden_act": ["silu"]},
    "rope of no theta": {"rope_parameters": {"rope_type": "nonsense"}},
    "rope as a word": {"rope_parameters": "fast"},
    "layer types of another length": {"layer_types": ["full_attention"]},
    "a method for a value": {"get_text_config": 5},
    "another file": {"configuration_files": ["config.4.0.0.json"]},
}


@pytest.mark.parametrize("changes", BOMBS.values(), ids=BOMBS.keys())
def test_configurations_that_no_file_is_for(changes: dict[str, Any], folder: Path, load: Any) -> None:
    with pytest.raises(SwaplessError):
        load(configure(folder, **changes))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file(name: str, folder: Path, load: Any) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((CheckpointCorruptError, CheckpointMissingError), match=name.replace(".", r"\.")):
        load(folder)


GENERATION: dict[str, Any] = {
    "no JSON": "{",
    "nested": "[" * 100_000,
    "a list": "[]",
    "beams as a word": {"num_beams": "many"},
    "a token as a word": {"eos_token_id": "</s>"},
    "tokens as words": {"eos_token_id": [1, "</s>"]},
    "a temperature without end": '{"temperature": Infinity}',
    "5000 digits": '{"max_length": ' + "9" * 5000 + "}",
    "a flag as a number": {"do_sample": 3},
    "no new tokens": {"max_new_tokens": 0},
    "a cache that is none": {"cache_implementation": "nonsense"},
    "a watermark that is none": {"watermarking_config": 3},
    "a compile_config": {"compile_config": "fast"},
}


@pytest.mark.parametrize("content", GENERATION.values(), ids=GENERATION.keys())
def test_a_generation_config_that_cannot_be(content: Any, folder: Path, load: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointCorruptError, match=r"generation_config\.json"):
        load(folder)


def test_a_generation_config_as_published(folder: Path, load: Any, eager: Any) -> None:
    values = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (folder / "generation_config.json").write_text(
        json.dumps(values | {"transformers_version": "4.51.0", "pad_token_id": None})
    )
    found, expected = load(folder).generation_config, eager(folder).generation_config
    assert found.to_diff_dict() == expected.to_diff_dict()


def test_a_model_of_text_out_of_one_of_pictures(tmp_path: Path, prompt: torch.Tensor, load: Any, eager: Any) -> None:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    from tests.families.tiny import decorated_families, tiny_model

    text = tiny_model(decorated_families()["qwen3_5_moe"]).config.get_text_config().to_dict()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    Qwen3_5MoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "both")
    expected = logits(eager(tmp_path / "both"), prompt)
    assert torch.equal(logits(load(tmp_path / "both"), prompt), expected)


def test_warnings_of_transformers_cannot_move_a_terminal(capfd: Any) -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.odd").warning("keys %s", "\x1b[2J\x07")
    assert "\x1b" not in capfd.readouterr().err
