"""Train the embedded model: `python -m training.train_embedded --corpus domains.parquet --minutes 45`.

Run it again with the same command and it goes on from its last checkpoint, bit for bit as if it had never stopped (with
`--steps`; under `--minutes` the learning rate follows the clock). Progress goes to stderr, figures to `log.jsonl` in the
run folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from training.corpus import WindowSampler, domain_texts, read_documents, token_streams
from training.locality import load_entropy, lru_hit_rate, shuffled_tokens
from training.model import balance_loss, build_model, embedded_config
from training.tokenizer import balanced_texts, train_tokenizer

VOCAB_SIZE = 4096
CONTEXT_TOKENS = 1024
TOKENIZER_CHARACTERS_PER_DOMAIN = 400_000
PROBE_WINDOWS_PER_DOMAIN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the result besides corpus, shape and budget. A checkpoint holds it; a resumed run must agree."""

    seed: int = 7
    rows: int = 16
    window_tokens: int = 256
    long_rows: int = 4
    long_window_tokens: int = 1024
    long_from: float = 0.9  # share of the budget after which windows are long
    domain_power: float = 0.5
    peak_lr: float = 3e-3
    final_lr_share: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.1
    balance_coefficient: float = 0.01
    max_grad_norm: float = 1.0
    domain_boost: dict[str, float] = field(default_factory=dict)  # factor on a domain's weight, 1 where none is given


class Trainer:
    """Model, optimiser and data order of one run; `step` changes all three, `save` and `restore` hold all three."""

    def __init__(
        self,
        config: Qwen3MoeConfig,
        streams: dict[str, np.ndarray],
        recipe: Recipe,
        *,
        steps: int | None,
        budget_s: float | None,
    ) -> None:
        if (steps is None) == (budget_s is None):
            raise ValueError(f"exactly one of steps and budget_s must be given. Got {steps} and {budget_s}.")
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = build_model(config)
        self._steps, self._budget_s = steps, budget_s
        self._short = WindowSampler(
            streams,
            rows=recipe.rows,
            window_tokens=recipe.window_tokens,
            power=recipe.domain_power,
            seed=recipe.seed,
            boost=recipe.domain_boost,
        )
        self._long = WindowSampler(
            streams,
            rows=recipe.long_rows,
            window_tokens=recipe.long_window_tokens,
            power=recipe.domain_power,
            seed=recipe.seed + 1,
            boost=recipe.domain_boost,
        )
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)
        self.step_count = 0
        self.tokens = 0
        self.elapsed_s = 0.0

    @property
    def progress(self) -> float:
        """Share of the budget used, 1 when done."""
        used = self.step_count / self._steps if self._steps is not None else self.elapsed_s / self._budget_s
        return min(1.0, used)

    def learning_rate(self) -> float:
        recipe = self.recipe
        warm = min(1.0, (self.step_count + 1) / recipe.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return recipe.peak_lr * warm * (recipe.final_lr_share + (1 - recipe.final_lr_share) * cosine)

    def step(self) -> dict[str, float]:
        """One optimiser step; returns the figures to log."""
        started = time.monotonic()
        sampler = self._long if self.progress >= self.recipe.long_from else self._short
        ids = torch.from_numpy(sampler.next_batch())
        rate = self.learning_rate()
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        loss, balance = language_and_balance_loss(self.model, ids)
        self._optimiser.zero_grad(set_to_none=True)
        (loss + self.recipe.balance_coefficient * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self._optimiser.step()
        self.step_count += 1
        self.tokens += ids.shape[0] * (ids.shape[1] - 1)
        self.elapsed_s += time.monotonic() - started
        return {"loss": loss.item(), "balance": balance.item(), "grad_norm": norm.item(), "lr": rate}

    def save(self, path: Path) -> None:
        """Write the whole state under a temporary name, then rename: a kill at any moment leaves a complete file."""
        partial = path.with_name("partial-" + path.name)
        state = {
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "short": self._short.state,
            "long": self._long.state,
            "step_count": self.step_count,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "recipe": asdict(self.recipe),
        }
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path, *, new_stage: bool = False) -> None:
        """Go on from a checkpoint of the same recipe, or of any other if this is a ``new_stage``."""
        state = torch.load(path, weights_only=True)
        older = asdict(Recipe()) | state["recipe"]
        if older != asdict(self.recipe) and not new_stage:
            changed = sorted(k for k, v in asdict(self.recipe).items() if older.get(k) != v)
            raise ValueError(f"{path} was written by another recipe (differs in {', '.join(changed)}). Use a new run folder.")
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["torch_rng"])
        self._short.restore(state["short"])
        self._long.restore(state["long"])
        self.step_count, self.tokens, self.elapsed_s = state["step_count"], state["tokens"], state["elapsed_s"]


def language_and_balance_loss(model: Qwen3MoeForCausalLM, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats, and the balance loss over the whole batch."""
    output = model.model(ids_BT[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state)
    loss = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    return loss, balance_loss(output.router_logits, model.config.num_experts_per_tok)


@torch.no_grad()
def probe(model: Qwen3MoeForCausalLM, streams: dict[str, np.ndarray], window_tokens: int) -> dict[str, Any]:
    """A cheap look at held-out text: loss a domain, lowest load entropy, LRU hit rate at E/4 and its lead over shuffling."""
    model.eval()
    E, K = model.config.num_experts, model.config.num_experts_per_tok
    losses, routing = {}, []
    for domain, stream in streams.items():
        windows = min(PROBE_WINDOWS_PER_DOMAIN, (len(stream) - 1) // window_tokens)
        ids = np.stack([stream[w * window_tokens : (w + 1) * window_tokens + 1] for w in range(windows)])
        ids_BT = torch.from_numpy(ids.astype(np.int64))
        output = model.model(ids_BT[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state)
        losses[domain] = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).item()
        routing.append(torch.stack([x.topk(K, dim=-1).indices for x in output.router_logits], dim=1).numpy())
    expert_ids = np.concatenate(routing)
    hit = lru_hit_rate(expert_ids, E, E // 4).mean()
    shuffled = lru_hit_rate(shuffled_tokens(expert_ids, seed=0), E, E // 4).mean()
    return {
        "held_out_loss": float(np.mean(list(losses.values()))),
        "min_load_entropy": float(load_entropy(expert_ids, E).min()),
        "lru_hit_rate": float(hit),
        "lru_lead": float(hit - shuffled),
        "held_out_losses": {domain: round(value, 3) for domain, value in losses.items()},
    }


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as users get it: bfloat16, one shard, one tensor an expert, tokenizer and sampling settings beside."""
    trainer.model.to(torch.bfloat16)
    trainer.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_or_train_tokenizer(folder: Path, texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """The run's tokenizer; trained once on held-in text, then read back, so that a resumed run has the same."""
    if not (folder / "tokenizer.json").exists():
        trained = train_tokenizer(balanced_texts(texts, TOKENIZER_CHARACTERS_PER_DOMAIN), VOCAB_SIZE, CONTEXT_TOKENS)
        partial = folder.with_name("partial-" + folder.name)
        trained.save_pretrained(partial)
        partial.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def show_progress(trainer: Trainer, figures: dict[str, float]) -> None:
    done = int(30 * trainer.progress)
    bar = "#" * done + "-" * (30 - done)
    rate = trainer.tokens / max(trainer.elapsed_s, 1e-9)
    text = f"\r[{bar}] {trainer.progress:4.0%} step {trainer.step_count} loss {figures['loss']:.3f} {rate:.0f} tok/s"
    print(text, end="", file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="Parquet file with columns domain, source, licence, text")
    parser.add_argument("--run", type=Path, default=Path("out/embedded"), help="run folder: checkpoint, log, token cache")
    parser.add_argument("--export", type=Path, default=None, help="folder for the finished model (default: RUN/model)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="training time, probes and checkpoints excluded")
    budget.add_argument("--steps", type=int, help="optimiser steps; gives the same bits on every run of one machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--balance", type=float, default=Recipe().balance_coefficient, help="coefficient of the balance loss")
    parser.add_argument(
        "--boost", action="append", default=[], metavar="DOMAIN=FACTOR", help="factor on a domain's weight; may be repeated"
    )
    parser.add_argument("--new-stage", action="store_true", help="go on from a checkpoint whose recipe was another")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    documents = read_documents(args.corpus)
    held_in, held_out = domain_texts(documents, held_out=False), domain_texts(documents, held_out=True)
    tokenizer = load_or_train_tokenizer(args.run / "tokenizer", held_in)
    streams = token_streams(held_in, tokenizer, args.run)
    held_out_streams = token_streams(held_out, tokenizer, args.run)
    config = embedded_config(
        len(tokenizer),
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    budget_s = None if args.minutes is None else 60 * args.minutes
    boost = {domain: float(factor) for domain, _, factor in (item.partition("=") for item in args.boost)}
    recipe = Recipe(balance_coefficient=args.balance, domain_boost=boost)
    trainer = Trainer(config, streams, recipe, steps=args.steps, budget_s=budget_s)
    checkpoint = args.run / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint, new_stage=args.new_stage)
        print(f"going on from step {trainer.step_count}", file=sys.stderr)

    saved_at = time.monotonic()
    with (args.run / "log.jsonl").open("a") as log:
        if trainer.step_count == 0 or args.new_stage:
            stage = {"from_step": trainer.step_count, "minutes": args.minutes, "steps": args.steps, "domain_boost": boost}
            print(json.dumps({"stage": stage}), file=log, flush=True)
        while trainer.progress < 1:
            figures: dict[str, Any] = trainer.step()
            show_progress(trainer, figures)
            due = time.monotonic() - saved_at > args.save_every or trainer.progress >= 1
            if due:
                trainer.save(checkpoint)
                figures |= probe(trainer.model, held_out_streams, recipe.window_tokens)
                saved_at = time.monotonic()
            if due or trainer.step_count % 10 == 0:
                where = {"step": trainer.step_count, "tokens": trainer.tokens, "elapsed_s": round(trainer.elapsed_s, 1)}
                print(json.dumps(where | figures), file=log, flush=True)
    print(file=sys.stderr)
    export(trainer, tokenizer, args.export or args.run / "model")


if __name__ == "__main__":
    main()
