"""Measure the embedded model on held-out text: `python -m training.evaluate_embedded --corpus domains.parquet`.

Writes `results.json` beside the weights: loss a domain, load entropy and temporal locality of the routing, and whether sampled
continuations stay in their domain. The weights are the shipped bfloat16 ones; arithmetic is float32 (the widening is exact).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training.continuations import judge_continuations
from training.corpus import domain_texts, read_documents, token_streams
from training.locality import load_entropy, lru_hit_rate, shuffled_tokens

WINDOW_TOKENS = 256
ROWS = 16
PACKAGE_DATA = Path(__file__).parents[1] / "src" / "swapless" / "embedded"


@torch.no_grad()
def score_stream(model: PreTrainedModel, ids: np.ndarray) -> tuple[float, np.ndarray]:
    """Total loss in nats over all tokens but the first, and the experts chosen for each input token, shape (T - 1, L, K).

    The stream is cut into windows, so that a token sees at most 256 tokens before it: a little worse than with full context.
    """
    inputs, targets = ids[:-1].astype(np.int64), ids[1:].astype(np.int64)
    whole = len(inputs) // WINDOW_TOKENS * WINDOW_TOKENS
    batches = [slice(at, min(at + ROWS * WINDOW_TOKENS, whole)) for at in range(0, whole, ROWS * WINDOW_TOKENS)]
    if whole < len(inputs):
        batches.append(slice(whole, len(inputs)))
    nats, routing = 0.0, []
    for batch in batches:
        width = min(WINDOW_TOKENS, batch.stop - batch.start)
        output = model.model(torch.from_numpy(inputs[batch]).view(-1, width), use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state).flatten(0, 1)
        nats += F.cross_entropy(logits, torch.from_numpy(targets[batch]), reduction="sum").item()
        top_k = model.config.num_experts_per_tok
        chosen = [layer_logits.topk(top_k, dim=-1).indices for layer_logits in output.router_logits]
        routing.append(torch.stack(chosen, dim=1).to(torch.int16).numpy())
    return nats, np.concatenate(routing)


def measure_text(
    model: PreTrainedModel, streams: dict[str, np.ndarray], texts: dict[str, list[str]]
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Loss of each domain, and the routing of each document; `streams` holds the tokens of `texts`, <eos> after each."""
    losses: dict[str, Any] = {}
    routing: dict[str, list[np.ndarray]] = {}
    for domain, stream in streams.items():
        eos = model.config.eos_token_id
        # an <eos> before the first document gives its first token a context, as every other document has
        nats, chosen = score_stream(model, np.concatenate([[eos], stream]))
        size_bytes = sum(len(text.encode()) for text in texts[domain])
        losses[domain] = {
            "documents": len(texts[domain]),
            "tokens": len(stream),
            "bytes": size_bytes,
            "nats_per_token": nats / len(stream),
            "bits_per_byte": nats / math.log(2) / size_bytes,
        }
        routing[domain] = np.split(chosen, np.flatnonzero(stream == eos)[:-1] + 1)
        print(f"{domain:14} {losses[domain]['nats_per_token']:.3f} nats/token", file=sys.stderr)
    return losses, routing


def measure_routing(routing: dict[str, list[np.ndarray]], num_experts: int, seed: int) -> dict[str, Any]:
    """Load entropy, and LRU hit rates at E/4 beside those of the same trace with its tokens shuffled."""
    by_domain = [document for documents in routing.values() for document in documents]
    order = np.random.default_rng(seed).permutation(len(by_domain))
    trace = np.concatenate([by_domain[index] for index in order])
    share = min(sum(map(len, documents)) for documents in routing.values())
    equal = np.concatenate([np.concatenate(documents)[:share] for documents in routing.values()])
    capacity = num_experts // 4
    hits = lru_hit_rate(trace, num_experts, capacity)
    shuffled = lru_hit_rate(shuffled_tokens(trace, seed), num_experts, capacity)
    domain_order = lru_hit_rate(np.concatenate(by_domain), num_experts, capacity)
    return {
        "tokens": len(trace),
        "requests": int(trace.size),
        "load_entropy_per_layer": load_entropy(trace, num_experts).tolist(),
        "load_entropy_equal_shares_per_layer": load_entropy(equal, num_experts).tolist(),
        "load_entropy_min": float(load_entropy(trace, num_experts).min()),
        "capacity_experts": capacity,
        "lru_hit_rate": float(hits.mean()),
        "lru_hit_rate_per_layer": hits.tolist(),
        "lru_hit_rate_shuffled": float(shuffled.mean()),
        "lru_hit_rate_shuffled_per_layer": shuffled.tolist(),
        "lru_lead": float((hits - shuffled).mean()),
        "lru_lead_per_layer": (hits - shuffled).tolist(),
        "lru_hit_rate_documents_by_domain": float(domain_order.mean()),
        "document_order": "all domains mixed at random; lru_hit_rate_documents_by_domain has them domain after domain",
    }


def training_summary(log: Path) -> dict[str, Any]:
    """Last line of the training log, which says what the run had done when it ended, and the stages that led there."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    stages = [line["stage"] for line in lines if "stage" in line]
    return {key: lines[-1][key] for key in ("step", "tokens", "elapsed_s", "loss", "balance")} | {"stages": stages}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the Parquet file that the model was trained on")
    parser.add_argument("--model", type=Path, default=PACKAGE_DATA, help="folder of the model")
    parser.add_argument(
        "--run", type=Path, default=Path("out/embedded"), help="folder of the training run: log and token cache"
    )
    parser.add_argument("--out", type=Path, default=PACKAGE_DATA / "results.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(args.threads)
    documents = read_documents(args.corpus)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held_out_texts = domain_texts(documents, held_out=True)
    held_in = token_streams(domain_texts(documents, held_out=False), tokenizer, args.run)
    held_out = token_streams(held_out_texts, tokenizer, args.run)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    losses, routing = measure_text(model, held_out, held_out_texts)
    results = {
        "format_version": 1,
        "training": training_summary(args.run / "log.jsonl") | {"held_in_tokens": sum(map(len, held_in.values()))},
        "held_out": losses,
        "held_out_mean_nats_per_token": float(np.mean([loss["nats_per_token"] for loss in losses.values()])),
        "held_out_mean_bits_per_byte": float(np.mean([loss["bits_per_byte"] for loss in losses.values()])),
        "routing": measure_routing(routing, model.config.num_experts, args.seed),
        "continuations": judge_continuations(model, tokenizer, held_in, held_out, args.seed),
        "seed": args.seed,
        "threads": args.threads,
        "parameters": model.num_parameters(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    results["evaluation_s"] = round(time.monotonic() - started, 1)
    partial = args.out.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    partial.replace(args.out)
    json.dump(
        {
            "continuation_accuracy_min": min(results["continuations"]["accuracy"].values()),
            "load_entropy_min": results["routing"]["load_entropy_min"],
            "lru_lead": results["routing"]["lru_lead"],
        },
        sys.stdout,
    )
    print()


if __name__ == "__main__":
    main()
