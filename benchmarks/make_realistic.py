"""Generate a qwen3moe-shaped checkpoint whose routers do what a real model's did: the routing of a recorded trace.

    python benchmarks/make_realistic.py --trace deepseek-v2-lite.puffin.parquet --out out/realistic
    python benchmarks/make_realistic.py --trace ... --out out/realistic-quick --quick     # 4 layers, hidden size 512

A model of random weights routes unlike any real one, so the weights are made the other way round, from the routing:

1. *Fewer experts than wanted.* The trace has E' experts, top-K', in L' MoE layers. E / E' of its layers together become one
   of ours (layers m, m + 5, m + 10, ... of the trace, which no other of ours has together): their experts stand side by
   side, and of each come K * E' / E, the first as recorded. So every stream of requests is a real one of its layer.
2. *Routers.* A linear router sees the token and little else, so the routing of a token is what it mostly was:
   a token's wish for an expert is the log of how often the trace sent it there, smoothed by the expert's share of all
   requests. All routers together are one matrix ``W`` [L * E, D] of orthonormal rows (columns, where L * E > D), and
   the embedding of a token is ``W' wishes``: times ``W`` that gives the wishes back, exactly where L * E <= D, else the nearest
   that a linear router can do.
3. *Residual branches* are small beside the embedding (``EMBEDDING_RMS``). How often the model's routing agrees with the wishes
   is measured, in one forward call over the sequence (token by token is the same but for rounding, and takes an hour);
   where the model loses more than a tenth of what the routers alone reach, it is refused.

The tokens are the trace's own sequence. Printed and kept in ``manifest.json``, beside each other: load entropy, consecutive
overlap and hit rate of LRU at E/4 of the trace as recorded, of its layers put together, of the most frequent experts, and of
the model. Experts' own weights are cut out of one pool of random numbers at changing places: no engine's speed
depends on them. Written in the fused layout, a shard a layer, with little memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import _normal, _write_index, consecutive_overlap, load_entropy, lru_hit_rate, route_in_prefill
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from swapless.atomic import write_json
from swapless.trace import TraceHeader, read_trace

FORMAT_VERSION = 1
ROUTER_LOGIT_STD = 2.0
EMBEDDING_RMS = 128.0
"""Beside it, what the residual branches add stays small, so that the token decides its route."""
WEIGHT_STD = 0.02
LAYER_STEP = 5
SMOOTHING = 1.0
"""Requests of the average token that a token's own are smoothed with."""
AGREEMENT_FLOOR = 0.9
SKIPPED_TOKENS = 20_000
FITTED_TOKENS = 40_000
PROMPT_TOKENS = 16
DECODE_TOKENS = 512
POOL_SLACK = 1 << 20
WEIGHTS = "weights.json"
"""Says in the folder that the weights are written, and from what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of the model."""

    moe_layers: int = 16
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    inner: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 32_768

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.inner

    @property
    def other_weights(self) -> int:
        """Weights of attention, routers, embedding and head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.moe_layers * (attention + self.hidden * self.experts) + 2 * self.vocab * self.hidden

    @property
    def total_bytes(self) -> int:
        """All weights in bf16, norms left out."""
        return 2 * (self.moe_layers * self.experts * self.expert_weights + self.other_weights)

    def config(self) -> Qwen3MoeConfig:
        """The transformers configuration; no end token, so that nothing stops early."""
        config = Qwen3MoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            moe_intermediate_size=self.inner,
            intermediate_size=self.inner,
            num_hidden_layers=self.moe_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            dtype="bfloat16",
        )
        config.architectures = [Qwen3MoeForCausalLM.__name__]
        return config


QUICK = Shape(moe_layers=4, hidden=512, inner=128, heads=4, kv_heads=2, vocab=16_384)


def layers_together(recorded: np.ndarray, header: TraceHeader, shape: Shape) -> np.ndarray:
    """Routing of ``shape``'s MoE layers out of the ``recorded`` (T, L', K'): int64 (T, L, K)."""
    groups = shape.experts // header.num_experts
    of_each = shape.top_k // groups if groups else 0
    if groups * header.num_experts != shape.experts or not 0 < of_each <= header.top_k or of_each * groups != shape.top_k:
        raise SystemExit(
            f"{shape.experts} experts, top-{shape.top_k}, cannot be put together from "
            f"{header.num_experts} experts, top-{header.top_k}"
        )
    layers = recorded.shape[1]
    parts = []
    for group in range(groups):
        chosen = [(moe_layer + LAYER_STEP * group) % layers for moe_layer in range(shape.moe_layers)]
        parts.append(recorded[:, chosen, :of_each] + header.num_experts * group)
    return np.concatenate(parts, axis=2)


def fit_wishes(tokens: np.ndarray, routing: np.ndarray, shape: Shape) -> np.ndarray:
    """How much each token of the vocabulary wants each expert: float32 (V, L * E), mean 0 and deviation 1 a MoE layer.

    Tokens that the trace never has get the wishes of those that it has, in turn, so that no row stands out.
    """
    seen = int(tokens.max()) + 1
    counts = np.zeros((seen, shape.moe_layers, shape.experts), np.float32)
    for moe_layer in range(shape.moe_layers):
        for k in range(shape.top_k):
            np.add.at(counts[:, moe_layer], (tokens, routing[:, moe_layer, k]), 1)
    share = counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None]
    times = counts.sum(axis=2, keepdims=True) / shape.top_k
    wishes = np.log((counts + SMOOTHING * shape.top_k * share) / (times + SMOOTHING) + 1e-4)
    wishes -= wishes.mean(axis=2, keepdims=True)
    wishes /= wishes.std(axis=2, keepdims=True)
    every = np.arange(shape.vocab) % seen
    return wishes.reshape(seen, -1)[every].astype(np.float32)


def router_matrix(shape: Shape, seed: int) -> torch.Tensor:
    """All routers, one below the other: float32 (L * E, D), its rows (or its columns, if there are fewer) orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape.moe_layers * shape.experts
    square = torch.randn(max(rows, shape.hidden), min(rows, shape.hidden), generator=generator)
    basis = torch.linalg.qr(square).Q
    return basis if rows >= shape.hidden else basis.T.contiguous()


def top_experts(scores: np.ndarray, shape: Shape) -> np.ndarray:
    """The K highest of each MoE layer: (..., L, K)."""
    return np.argsort(-scores.reshape(*scores.shape[:-1], shape.moe_layers, shape.experts), axis=-1)[..., : shape.top_k]


def agreement(routing: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the requests in ``routing`` that are in ``wanted`` too, both (T, L, K)."""
    return float((routing[..., :, None] == wanted[..., None, :]).any(axis=-1).mean())


def figures(routing: np.ndarray, experts: int) -> dict[str, float]:
    """Load entropy (mean of the MoE layers), consecutive overlap, LRU hit rate at E/4."""
    return {
        "load_entropy": round(float(load_entropy(routing, experts).mean()), 4),
        "consecutive_overlap": round(float(consecutive_overlap(routing).mean()), 4),
        "lru_hit_rate_quarter": round(lru_hit_rate(routing, experts // 4), 4),
    }


def write_checkpoint(shape: Shape, out: Path, embedding: torch.Tensor, routers: torch.Tensor, seed: int) -> None:
    """The fused layout: a shard a MoE layer and one with the rest."""
    out.mkdir(parents=True, exist_ok=True)
    name = "model-{:05d}-of-" + f"{shape.moe_layers + 1:05d}.safetensors"
    pool = _normal((shape.expert_weights + POOL_SLACK,), WEIGHT_STD, (seed, 3))
    rng = np.random.default_rng(seed)
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    head_ones = torch.ones(shape.head_dim, dtype=torch.bfloat16)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q": (queries, shape.hidden), "k": (keys, shape.hidden), "v": (keys, shape.hidden), "o": (shape.hidden, queries)}
    for block in range(shape.moe_layers):
        prefix = f"model.layers.{block}."
        tensors = {
            f"{prefix}self_attn.{part}_proj.weight": _normal(size, WEIGHT_STD, (seed, block, 10 + place))
            for place, (part, size) in enumerate(sizes.items())
        }
        tensors |= {f"{prefix}self_attn.{part}_norm.weight": head_ones.clone() for part in "qk"}
        tensors |= {f"{prefix}{part}_layernorm.weight": ones.clone() for part in ("input", "post_attention")}
        mine = routers[block * shape.experts : (block + 1) * shape.experts]
        tensors[f"{prefix}mlp.gate.weight"] = mine.to(torch.bfloat16).contiguous()
        gate_up = torch.empty((shape.experts, 2 * shape.inner, shape.hidden), dtype=torch.bfloat16)
        down = torch.empty((shape.experts, shape.hidden, shape.inner), dtype=torch.bfloat16)
        for expert, first in enumerate(rng.integers(0, POOL_SLACK, shape.experts).tolist()):
            weights = pool[first : first + shape.expert_weights]
            gate_up[expert] = weights[: gate_up[expert].numel()].view_as(gate_up[expert])
            down[expert] = weights[gate_up[expert].numel() :].view_as(down[expert])
        tensors |= {f"{prefix}mlp.experts.gate_up_proj": gate_up, f"{prefix}mlp.experts.down_proj": down}
        save_file(tensors, out / name.format(block + 2), metadata={"format": "pt"})
    head = _normal((shape.vocab, shape.hidden), WEIGHT_STD, (seed, 1002))
    rest = {"model.embed_tokens.weight": embedding.to(torch.bfloat16), "model.norm.weight": ones, "lm_head.weight": head}
    save_file(rest, out / name.format(1), metadata={"format": "pt"})
    _write_index(out)
    shape.config().save_pretrained(out)


def _read(path: Path) -> tuple[TraceHeader, np.ndarray, np.ndarray]:
    """Header, tokens (T,) and routing int64 (T, L', K') of the rows that are fitted."""
    trace = read_trace(path)
    first = SKIPPED_TOKENS if len(trace) > SKIPPED_TOKENS + FITTED_TOKENS else 0
    rows = slice(first, first + FITTED_TOKENS)
    named = trace.token if trace.token is not None else trace.token_id
    if named is None:
        raise SystemExit(f"{path.name} does not say its tokens")
    return trace.header, np.asarray(named[rows].tolist(), object), np.asarray(trace.expert_ids[rows]).astype(np.int64)


def make(out: Path, trace: Path, *, shape: Shape, seed: int = 0, decode_tokens: int = DECODE_TOKENS) -> dict[str, Any]:
    """Make the checkpoint in ``out/fused`` with ``out/tokens.json`` and ``out/manifest.json``, which it returns.

    A folder whose manifest asks for the same is left as it is.
    """
    wanted = {"format_version": FORMAT_VERSION, "shape": asdict(shape), "trace": trace.name, "seed": seed}
    wanted["decode_tokens"] = decode_tokens
    manifest = out / "manifest.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if all(found.get(key) == value for key, value in wanted.items()):
            return found
        raise SystemExit(f"{out} holds another checkpoint: remove it or choose another --out")
    room = shutil.disk_usage(out.parent if not out.exists() else out).free
    if room < shape.total_bytes * 1.05:
        raise SystemExit(f"{shape.total_bytes / 1e9:.1f} GB are needed, {room / 1e9:.1f} GB are free")
    header, words, recorded = _read(trace)
    _, tokens = np.unique(words, return_inverse=True)
    if tokens.max() >= shape.vocab:
        raise SystemExit(f"the trace has {tokens.max() + 1} tokens, the vocabulary has room for {shape.vocab}")
    routing = layers_together(recorded, header, shape)
    wishes = torch.from_numpy(fit_wishes(tokens, routing, shape))
    matrix = router_matrix(shape, seed)
    embedding = wishes @ matrix
    embedding *= EMBEDDING_RMS / embedding.square().mean(dim=1, keepdim=True).sqrt()
    normed = embedding / EMBEDDING_RMS
    routers = matrix * (ROUTER_LOGIT_STD / (normed[:256] @ matrix.T).std())

    sequence = tokens[: PROMPT_TOKENS + decode_tokens]
    if not (out / WEIGHTS).exists() or json.loads((out / WEIGHTS).read_text()) != wanted:
        write_checkpoint(shape, out / "fused", embedding, routers, seed)
        write_json(out / WEIGHTS, wanted)
    model = AutoModelForCausalLM.from_pretrained(out / "fused", dtype="auto", experts_implementation="eager").eval()
    routed = route_in_prefill(model, sequence)[PROMPT_TOKENS:]
    del model
    after = slice(PROMPT_TOKENS, PROMPT_TOKENS + decode_tokens)
    linear = top_experts((normed[sequence[after]] @ routers.T).numpy(), shape)
    wished = top_experts(wishes[sequence[after]].numpy(), shape)
    measured = {
        "trace": figures(recorded[after], header.num_experts),
        "layers_together": figures(routing[after], shape.experts),
        "most_frequent_experts": figures(wished, shape.experts),
        "model": figures(routed, shape.experts),
        "router_agrees_with_most_frequent": round(agreement(linear, wished), 4),
        "model_agrees_with_most_frequent": round(agreement(routed, wished), 4),
        "model_agrees_with_trace": round(agreement(routed, routing[after]), 4),
        "distinct_tokens": int(tokens.max()) + 1,
    }
    if measured["model_agrees_with_most_frequent"] < AGREEMENT_FLOOR * measured["router_agrees_with_most_frequent"]:
        raise AssertionError(f"the residual branches drown the embedding: {measured}")
    write_json(out / "tokens.json", {"prompt": sequence[:PROMPT_TOKENS].tolist(), "decode": sequence[after].tolist()})
    document = wanted | {"total_bytes": shape.total_bytes, "routing": measured}
    write_json(manifest, document)
    return document


def main() -> int:
    """Make it and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="a trace with tokens (docs/formats/trace.md)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="4 layers of hidden size 512")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = QUICK if options.quick else Shape()
    json.dump(make(options.out, options.trace, shape=shape, seed=options.seed), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
