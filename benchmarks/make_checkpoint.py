"""Generate the benchmark's checkpoint: an OLMoE of random weights that routes like a trained model, and proves it.

    python benchmarks/make_checkpoint.py --out out/bench-3gb

8 MoE layers of 64 experts of 6 MiB (bf16), top-8: 3.2 GB, once in the original layout (a tensor an expert) and once in the
fused one (``--layout`` keeps only one), the same weights in both, written layer by layer so that little memory is needed.

Why the routing has to be made. A default-initialised model lets attention and the sum of its layers drown the token:
consecutive tokens share most of their experts, only some experts are ever used, and any cache looks good. Here

- the embeddings are large beside what the layers add (``EMBEDDING_STD``), so that the token decides its route: load entropy
  near 1;
- routers are scaled to a logit spread of 2 (``ROUTER_LOGIT_STD``), as trained routers have, so that gate weights are
  uneven;
- the vocabulary is split into topics. A token's embedding is ``sqrt(share) * topic + sqrt(1 - share) * own``, and the
  benchmark's tokens come from a Markov chain over topics that stays with probability ``1 - 1 / DWELL_TOKENS``. Independent
  random tokens would share only K/E = 0.125 of their experts; the share is bisected until the mean consecutive overlap is
  0.30. With it the LRU hit rate at E/4 comes to about 0.5, where a real trace (DeepSeek-V2-Lite, 64 experts) has 0.48.

The figures are taken in real decode, token by token through the finished checkpoint, over ``DECODE_TOKENS`` teacher-forced
tokens of that chain; the first of them are what the benchmark decodes. Asserted for every MoE layer: load entropy >= 0.95
(normalised by log E), consecutive overlap in 0.25-0.45. Printed with them: the hit rate of LRU with E/4 slots a layer, the
K experts of a token judged at once. ``tokens.json`` holds the token sequence, ``manifest.json`` the
figures; it is written last, and a folder that has it is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from swapless.atomic import write_json

FORMAT_VERSION = 1
EMBEDDING_STD = 8.0
ROUTER_LOGIT_STD = 2.0
WEIGHT_STD = 0.02
DWELL_TOKENS = 8
TOPICS = 64
PROMPT_TOKENS = 16
DECODE_TOKENS = 512
OVERLAP_TARGET = 0.30
OVERLAP_BAND = (0.25, 0.45)
ENTROPY_FLOOR = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of the model: what the command line can change."""

    moe_layers: int = 8
    experts: int = 64
    top_k: int = 8
    hidden: int = 1024
    inner: int = 1024
    vocab: int = 8192

    @property
    def expert_bytes(self) -> int:
        """One expert in bf16."""
        return 3 * self.hidden * self.inner * 2

    @property
    def total_bytes(self) -> int:
        """All weights in bf16, norms left out."""
        return self.moe_layers * (self.experts * self.expert_bytes + 8 * self.hidden**2) + 4 * self.vocab * self.hidden

    def config(self) -> OlmoeConfig:
        """The transformers configuration; no end token, so that nothing stops early."""
        return OlmoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.moe_layers,
            num_attention_heads=max(1, self.hidden // 64),
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            dtype="bfloat16",
        )


def _normal(shape: tuple[int, ...], std: float, seed: tuple[int, ...]) -> torch.Tensor:
    """Normal bf16 weights that depend on ``seed`` alone, so that the order of writing changes nothing."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generator = torch.Generator().manual_seed(state)
    return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)


def _block_tensors(shape: Shape, block: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Attention, norms and router of one block, and its fused experts: ``gate_up [E, 2F, D]`` and ``down [E, D, F]``."""
    prefix = f"model.layers.{block}."
    d = shape.hidden
    ones = torch.ones(d, dtype=torch.bfloat16)
    rest = {
        f"{prefix}self_attn.{name}_proj.weight": _normal((d, d), WEIGHT_STD, (seed, block, 10 + i))
        for i, name in enumerate("qkvo")
    }
    for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
        rest[f"{prefix}{name}.weight"] = ones.clone()
    rest[f"{prefix}mlp.gate.weight"] = _normal((shape.experts, d), ROUTER_LOGIT_STD / d**0.5, (seed, block, 1))
    gate_up = torch.empty((shape.experts, 2 * shape.inner, d), dtype=torch.bfloat16)
    down = torch.empty((shape.experts, d, shape.inner), dtype=torch.bfloat16)
    for expert in range(shape.experts):
        gate_up[expert] = _normal((2 * shape.inner, d), WEIGHT_STD, (seed, block, 2, expert))
        down[expert] = _normal((d, shape.inner), WEIGHT_STD, (seed, block, 3, expert))
    return rest, gate_up, down


def _expert_tensors(
    shape: Shape, block: int, gate_up: torch.Tensor, down: torch.Tensor, layout: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of one block's experts as the layout stores them."""
    prefix = f"model.layers.{block}.mlp.experts."
    if layout == "fused":
        yield f"{prefix}gate_up_proj", gate_up
        yield f"{prefix}down_proj", down
        return
    for expert in range(shape.experts):
        gate, up = gate_up[expert].chunk(2)
        yield f"{prefix}{expert}.gate_proj.weight", gate.contiguous()
        yield f"{prefix}{expert}.up_proj.weight", up.contiguous()
        yield f"{prefix}{expert}.down_proj.weight", down[expert].contiguous()


def make_embedding(shape: Shape, topic_of: np.ndarray, share: float, seed: int) -> torch.Tensor:
    """Token embeddings that share ``share`` of their variance within a topic."""
    topics = _normal((TOPICS, shape.hidden), 1.0, (seed, 1000)).float()
    own = _normal((shape.vocab, shape.hidden), 1.0, (seed, 1001)).float()
    mixed = share**0.5 * topics[torch.from_numpy(topic_of)] + (1 - share) ** 0.5 * own
    return (mixed * EMBEDDING_STD).to(torch.bfloat16)


def make_tokens(shape: Shape, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Topic of every token id, and ``count`` tokens of the chain that stays on a topic for ``DWELL_TOKENS`` on average."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2000]))
    topic_of = np.arange(shape.vocab) % TOPICS
    tokens = np.empty(count, np.int64)
    topic = int(rng.integers(TOPICS))
    for position in range(count):
        if rng.random() < 1 / DWELL_TOKENS:
            topic = int(rng.integers(TOPICS))
        tokens[position] = topic + TOPICS * rng.integers(shape.vocab // TOPICS)
    return topic_of, tokens


def write_folder(
    shape: Shape, out: Path, layout: str, seed: int, embedding: torch.Tensor | None, *, blocks: bool = True
) -> None:
    """Write one layout: a shard a block, a shard with the rest (if the embedding is known), the index, the configuration."""
    out.mkdir(parents=True, exist_ok=True)
    shards = shape.moe_layers + 1
    name = "model-{:05d}-of-{:05d}.safetensors"
    if blocks:
        for block in range(shape.moe_layers):
            rest, gate_up, down = _block_tensors(shape, block, seed)
            tensors = rest | dict(_expert_tensors(shape, block, gate_up, down, layout))
            save_file(tensors, out / name.format(block + 2, shards), metadata={"format": "pt"})
    if embedding is not None:
        head = _normal((shape.vocab, shape.hidden), WEIGHT_STD, (seed, 1002))
        norm = torch.ones(shape.hidden, dtype=torch.bfloat16)
        rest = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": head}
        save_file(rest, out / name.format(1, shards), metadata={"format": "pt"})
        _write_index(out)
    config = shape.config()
    config.architectures = [OlmoeForCausalLM.__name__]
    config.save_pretrained(out)


def _write_index(out: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for shard in sorted(out.glob("model-*.safetensors")):
        with open(shard, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            weight_map[key] = shard.name
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


class RoutingRecorder:
    """Collects the router's choices, ``[T, L, K]``, of every forward call while it is attached."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._rows: list[list[np.ndarray]] = []
        self._blocks = [block.mlp.gate for block in model.model.layers]  # type: ignore[union-attr]
        self._hooks = [gate.register_forward_hook(self._keep(i)) for i, gate in enumerate(self._blocks)]

    def _keep(self, moe_layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if moe_layer == 0:
                self._rows.append([])
            self._rows[-1].append(output[2].numpy().copy())

        return hook

    def expert_ids(self) -> np.ndarray:
        """All choices so far."""
        return np.concatenate([np.stack(row, axis=1) for row in self._rows])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.inference_mode()
def route_in_prefill(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Router choices of one forward over all tokens: the same as in decode but for rounding, and much faster to search with."""
    recorder = RoutingRecorder(model)
    model(input_ids=torch.from_numpy(tokens)[None], use_cache=False, logits_to_keep=1)
    recorder.close()
    return recorder.expert_ids()


@torch.inference_mode()
def route_in_decode(model: torch.nn.Module, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """Router choices of the tokens after the prompt, each its own forward call."""
    cache = model(input_ids=torch.from_numpy(tokens[:prompt])[None], use_cache=True, logits_to_keep=1).past_key_values
    recorder = RoutingRecorder(model)
    for token in tokens[prompt:]:
        model(input_ids=torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True)
    recorder.close()
    return recorder.expert_ids()


def load_entropy(expert_ids: np.ndarray, experts: int) -> np.ndarray:
    """Entropy of the load of each MoE layer over log E, in [0, 1]."""
    loads = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in expert_ids.swapaxes(0, 1)])
    share = loads / loads.sum(axis=1, keepdims=True)
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0)
    return -terms.sum(axis=1) / np.log(experts)


def consecutive_overlap(expert_ids: np.ndarray) -> np.ndarray:
    """Share of a token's experts that the token before it used too, mean of each MoE layer."""
    same = (expert_ids[1:, :, :, None] == expert_ids[:-1, :, None, :]).any(axis=3)
    return same.mean(axis=(0, 2))


def lru_hit_rate(expert_ids: np.ndarray, capacity: int) -> float:
    """Hits of per-layer LRU caches that start empty, all K experts of a token judged on the state before the token."""
    hits = 0
    for layer in expert_ids.swapaxes(0, 1):
        order: dict[int, None] = {}
        for chosen in layer.tolist():
            hits += sum(expert in order for expert in chosen)
            for expert in chosen:
                order.pop(expert, None)
                order[expert] = None
            while len(order) > capacity:
                del order[next(iter(order))]
    return hits / expert_ids.size


def figures(expert_ids: np.ndarray, experts: int) -> dict[str, Any]:
    """What the routing looks like, rounded for reading."""
    return {
        "tokens": int(expert_ids.shape[0]),
        "load_entropy": [round(float(x), 4) for x in load_entropy(expert_ids, experts)],
        "consecutive_overlap": [round(float(x), 4) for x in consecutive_overlap(expert_ids)],
        "lru_hit_rate_quarter": round(lru_hit_rate(expert_ids, experts // 4), 4),
    }


def check(measured: dict[str, Any]) -> None:
    """Fail loudly if the routing is not like a real model's."""
    low, high = OVERLAP_BAND
    if min(measured["load_entropy"]) < ENTROPY_FLOOR:
        raise AssertionError(f"load entropy must be >= {ENTROPY_FLOOR} in every MoE layer, got {measured['load_entropy']}")
    if not all(low <= overlap <= high for overlap in measured["consecutive_overlap"]):
        raise AssertionError(
            f"consecutive overlap must be in {OVERLAP_BAND} in every MoE layer, got {measured['consecutive_overlap']}"
        )


def find_share(model: torch.nn.Module, shape: Shape, topic_of: np.ndarray, tokens: np.ndarray, seed: int) -> float:
    """Bisect the topic's share of the embedding until the mean consecutive overlap meets the target."""
    low, high = 0.0, 0.95
    for _ in range(7):
        share = (low + high) / 2
        model.model.embed_tokens.weight.data = make_embedding(shape, topic_of, share, seed)  # type: ignore[union-attr]
        overlap = float(consecutive_overlap(route_in_prefill(model, tokens)).mean())
        print(f"  topic share {share:.3f}: consecutive overlap {overlap:.3f}", file=sys.stderr)
        if abs(overlap - OVERLAP_TARGET) < 0.01:
            break
        low, high = (share, high) if overlap < OVERLAP_TARGET else (low, share)
    return share


def make(
    out: Path, *, shape: Shape | None = None, layout: str = "both", seed: int = 0, decode_tokens: int = DECODE_TOKENS
) -> dict[str, Any]:
    """Make the checkpoint unless it is there, and return its manifest.

    State changes: fills ``out/original`` and ``out/fused`` (or one of them), ``out/tokens.json`` and ``out/manifest.json``.
    """
    shape = shape or Shape()
    wanted = {
        "format_version": FORMAT_VERSION,
        "shape": asdict(shape),
        "layout": layout,
        "seed": seed,
        "decode_tokens": decode_tokens,
    }
    manifest = out / "manifest.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if all(found.get(key) == value for key, value in wanted.items()):
            return found
        raise FileExistsError(
            f"{out} holds another checkpoint ({found.get('shape')}, seed {found.get('seed')}); choose another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    need = 2 * shape.total_bytes + 2**30
    free = shutil.disk_usage(out).free
    if free < need:
        raise OSError(f"Not enough free disk at {out}: need {need / 1e9:.1f} GB, got {free / 1e9:.1f} GB.")

    torch.set_num_threads(1)  # the result must not depend on the number of cores
    started = time.perf_counter()
    topic_of, tokens = make_tokens(shape, seed, PROMPT_TOKENS + decode_tokens)
    write_folder(shape, out / "fused", "fused", seed, make_embedding(shape, topic_of, 0.5, seed))
    print(f"experts written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    model = _load(out / "fused")
    share = find_share(model, shape, topic_of, tokens, seed)
    del model
    embedding = make_embedding(shape, topic_of, share, seed)
    write_folder(shape, out / "fused", "fused", seed, embedding, blocks=False)
    if layout in ("both", "original"):
        write_folder(shape, out / "original", "original", seed, embedding)
        print(f"original layout written, {time.perf_counter() - started:.0f} s so far", file=sys.stderr)
    measured = figures(route_in_decode(_load(out / "fused"), tokens, PROMPT_TOKENS), shape.experts)
    print(json.dumps(measured), file=sys.stderr)
    check(measured)
    if layout == "original":
        shutil.rmtree(out / "fused")
    write_json(out / "tokens.json", {"prompt": tokens[:PROMPT_TOKENS].tolist(), "decode": tokens[PROMPT_TOKENS:].tolist()})
    done = wanted | {
        "expert_bytes": shape.expert_bytes,
        "experts_total": shape.moe_layers * shape.experts,
        "topic_share": share,
        "routing": measured,
    }
    write_json(manifest, done)
    return done


def _load(folder: Path) -> torch.nn.Module:
    """The fused checkpoint, its experts memory-mapped; a missing or left-over name is an error, never a fresh weight."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager", local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise AssertionError(f"the generated checkpoint does not match its model: {info}")
    return model.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Generate the checkpoint of the offloading benchmark.")
    parser.add_argument("--out", type=Path, default=Path("out/bench-3gb"))
    parser.add_argument("--layout", choices=("both", "original", "fused"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moe-layers", type=int, default=Shape().moe_layers)
    parser.add_argument("--inner", type=int, default=Shape().inner, help="expert inner size; hidden size stays")
    parser.add_argument("--hidden", type=int, default=Shape().hidden)
    parser.add_argument("--decode-tokens", type=int, default=DECODE_TOKENS)
    arguments = parser.parse_args()
    shape = Shape(moe_layers=arguments.moe_layers, inner=arguments.inner, hidden=arguments.hidden)
    done = make(arguments.out, shape=shape, layout=arguments.layout, seed=arguments.seed, decode_tokens=arguments.decode_tokens)
    print(json.dumps(done, indent=2))


if __name__ == "__main__":
    main()
