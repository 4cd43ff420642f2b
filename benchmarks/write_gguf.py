"""Write a checkpoint of ``benchmarks/make_realistic.py`` as a GGUF file of the same shapes, for llama.cpp.

    python benchmarks/write_gguf.py out/realistic/fused out/realistic/q4_0.gguf --type Q4_0

Needs numpy and ``gguf`` (PyPI), no torch. Experts, attention and head are quantised to Q4_0 or Q8_0; embedding, routers and
norms stay F16 or F32, so that tokens take the same route as in the checkpoint. There is no vocabulary in it: the
benchmark speaks in token ids.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

KIND = gguf.GGMLQuantizationType
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm",
    "mlp.gate.weight": "ffn_gate_inp",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class Checkpoint:
    """Tensors of a folder of bf16 safetensors shards, as float32, mapped and not copied until they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with open(shard, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for key, entry in header.items():
                if key != "__metadata__":
                    assert entry["dtype"] == "BF16", f"{key} is {entry['dtype']}"
                    self._places[key] = shard, 8 + length + entry["data_offsets"][0], tuple(entry["shape"])

    def mapped(self, key: str) -> np.ndarray:
        """The bits of a tensor, uint16, on disk."""
        file, offset, shape = self._places[key]
        return np.memmap(file, np.uint16, "r", offset, shape)


def widened(bits: np.ndarray) -> np.ndarray:
    """Values of bf16 ``bits``."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def converted(bits: np.ndarray, kind: Any) -> np.ndarray:
    """Rows of bf16 ``bits`` in the type ``kind``."""
    return quantize(widened(bits), kind)


def tensors(config: dict[str, Any], checkpoint: Checkpoint, kind: Any) -> list[tuple[str, str, slice | None, Any]]:
    """(name in the GGUF, key in the checkpoint, rows of each expert or None for all, type) of every tensor."""
    found: list[tuple[str, str, slice | None, Any]] = []
    for key, name in NAMES.items():
        found.append((name, key, None, {"output.weight": kind, "output_norm.weight": KIND.F32}.get(name, KIND.F16)))
    inner = config["moe_intermediate_size"]
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}."
        for key, name in LAYER_NAMES.items():
            of = KIND.F32 if "norm" in name or name == "ffn_gate_inp" else kind
            found.append((f"blk.{block}.{name}.weight", prefix + key, None, of))
        experts = f"{prefix}mlp.experts."
        found.append((f"blk.{block}.ffn_gate_exps.weight", f"{experts}gate_up_proj", slice(0, inner), kind))
        found.append((f"blk.{block}.ffn_up_exps.weight", f"{experts}gate_up_proj", slice(inner, 2 * inner), kind))
        found.append((f"blk.{block}.ffn_down_exps.weight", f"{experts}down_proj", slice(None), kind))
    return found


def write(folder: Path, out: Path, kind: Any) -> None:
    """Write the file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(folder)
    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    wanted = tensors(config, checkpoint, kind)
    for name, key, rows, of in wanted:
        bits = checkpoint.mapped(key)
        one = converted(bits[:1, rows] if rows is not None else bits[:1], of)
        shape = (bits.shape[0], *one.shape[1:])
        writer.add_tensor_info(name, shape, one.dtype, int(np.prod(shape)) * one.itemsize, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, key, rows, of in wanted:
        bits = checkpoint.mapped(key)
        parts = [bits] if rows is None else [expert[None, rows] for expert in bits]
        writer.write_tensor_data(np.concatenate([converted(part, of) for part in parts]))
    writer.close()


def parts(file: Path) -> dict[str, int]:
    """Bytes of experts, of the embedding, and of all else, the header with it."""
    found = {"experts": 0, "embedding": 0}
    for tensor in gguf.GGUFReader(file).tensors:
        if "_exps" in tensor.name:
            found["experts"] += int(tensor.n_bytes)
        elif tensor.name.startswith("token_embd"):
            found["embedding"] += int(tensor.n_bytes)
    return found | {"others": file.stat().st_size - sum(found.values())}


def main() -> int:
    """Write the file of the command line, unless it is there, and print its bytes by part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("Q4_0", "Q8_0"), default="Q4_0")
    options = parser.parse_args()
    if not options.out.exists():
        part = options.out.with_suffix(".part")
        write(options.checkpoint, part, KIND[options.type])
        part.replace(options.out)
    print(json.dumps(parts(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
