"""Small checkpoints to damage, and what is asked of each: by us and by transformers, in a process of its own."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

IDS = [5, 9, 14, 3, 60]


def make(folder: Path, *, sharded: bool) -> Path:
    """A Qwen3-MoE of two layers in bf16 with a generation configuration."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    values = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def with_tokenizer(folder: Path) -> Path:
    """The embedded model's tokenizer with a chat template, and a configuration to go with it."""
    from swapless import embedded

    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(embedded.path()) / name, folder)
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def header_of(shard: bytes) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", shard[:8])
    return json.loads(shard[8 : 8 + length]), shard[8 + length :]


def shard_of(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header's text and data."""
    return struct.pack("<Q", len(header)) + header + data


def ours(folder: str) -> tuple[str, bytes, list[int]]:
    """Type, logits and greedy tokens of a folder by ``swapless.load``."""
    import swapless

    with swapless.load(folder, resident=0.5, context=32) as model:
        return _asked(model)


def theirs(folder: str) -> tuple[str, bytes, list[int]]:
    """Likewise, by transformers with eager experts and weights aligned to 64 bytes."""
    from transformers import AutoModelForCausalLM

    from tests.families.tiny import clone_weights

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", local_files_only=True).eval()
    return _asked(clone_weights(model))


def _asked(model: Any) -> tuple[str, bytes, list[int]]:
    import torch

    ids = torch.tensor([IDS]) % model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    how |= {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0, "eos_token_id": 63}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return str(logits.dtype), logits.float().numpy().tobytes(), tokens[0].tolist()


def our_tokens(folder: str) -> tuple[list[int], list[int], str]:
    """Ids of a text and of a conversation by our door, and the text back."""
    from swapless.cli.session import open_tokenizer, prompt_ids
    from swapless.cli.template import chat_ids

    tokenizer = open_tokenizer(folder)
    ids = prompt_ids(tokenizer, "Once upon a time, 1 + 1.")[0].tolist()
    chat = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])[0].tolist()
    return ids, chat, tokenizer.decode(ids)


def their_tokens(folder: str) -> tuple[list[int], list[int], str]:
    """Likewise, by transformers."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer("Once upon a time, 1 + 1.")["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True)
    return ids, chat["input_ids"], tokenizer.decode(ids)
