"""Write MODEL_CARD.md from the corpus, the shipped config and results.json: `python -m training.card --corpus domains.parquet`.

No figure in the card is typed by hand, so that card and weights cannot drift apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from training.corpus import Document, read_documents
from training.evaluate_embedded import PACKAGE_DATA
from training.train_embedded import Recipe

CONTINUATION_BAR = 0.8  # share of a domain's continuations that the classifier should name right

ATTRIBUTIONS = {
    "stories": "TinyStories, Ronen Eldan and Yuanzhi Li",
    "drama": "works of William Shakespeare, collected by Andrej Karpathy",
    "encyclopedia": "WikiText-2, Stephen Merity and others, from English Wikipedia and its contributors",
    "code-python": "The Algorithms and contributors",
    "code-java": "The Algorithms and contributors",
    "code-cpp": "The Algorithms and contributors",
    "code-rust": "The Algorithms and contributors",
    "math-words": "GSM8K, Karl Cobbe and others, OpenAI",
    "medicine": "MedQuAD, Asma Ben Abacha and Dina Demner-Fushman",
    "law-german": "statutes of the Federal Republic of Germany",
    "novel-italian": "Alessandro Manzoni",
} | {
    f"wiki-{language}": "XQuAD, Mikel Artetxe, Sebastian Ruder and Dani Yogatama, from Wikipedia and its contributors"
    for language in ("de", "el", "es", "ru", "tr", "zh")
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def data_table(documents: list[Document]) -> str:
    """One row a domain: where its text is from, under which licence, and how many documents stand on each side of the split."""
    rows = []
    for domain in sorted({document.domain for document in documents}):
        own = [document for document in documents if document.domain == domain]
        held_out = sum(document.held_out for document in own)
        sources = ", ".join(sorted({document.source for document in own}))
        licences = ", ".join(sorted({document.licence for document in own}))
        size = sum(len(document.text.encode()) for document in own)
        counts = f"{len(own) - held_out} / {held_out}"
        rows.append([domain, f"{size / 1e6:.2f}", counts, sources, ATTRIBUTIONS[domain], licences])
    return table(["domain", "MB", "documents in / held out", "source", "attribution", "licence"], rows)


def domain_results(results: dict[str, Any]) -> str:
    rows = []
    continuations = results["continuations"]
    for domain, loss in results["held_out"].items():
        wrong = {other: n for other, n in continuations["confusion"][domain].items() if other != domain}
        rows.append(
            [
                domain,
                str(loss["tokens"]),
                f"{loss['nats_per_token']:.3f}",
                f"{loss['bits_per_byte']:.3f}",
                f"{continuations['accuracy'][domain]:.1f}",
                f"{continuations['accuracy_real_text'][domain]:.2f}",
                ", ".join(f"{other} {n}" for other, n in wrong.items()) or "-",
            ]
        )
    head = ["domain", "held-out tokens", "nats/token", "bits/byte", "continuations named right", "real text named right"]
    return table([*head, "taken for"], rows)


def layer_results(routing: dict[str, Any]) -> str:
    keys = ["load_entropy_per_layer", "load_entropy_equal_shares_per_layer"]
    keys += ["lru_hit_rate_per_layer", "lru_hit_rate_shuffled_per_layer", "lru_lead_per_layer"]
    rows = [
        [str(moe_layer), *(f"{value:.3f}" for value in values)]
        for moe_layer, values in enumerate(zip(*(routing[key] for key in keys), strict=True))
    ]
    head = ["MoE layer", "load entropy", "load entropy, equal shares", "LRU hit rate", "shuffled tokens", "lead"]
    return table(head, rows)


def samples(results: dict[str, Any], domains: tuple[str, ...]) -> str:
    """A few continuations, cut short, on one line each; the first of each domain, not the best."""
    lines = []
    for domain in domains:
        sample = results["continuations"]["samples"][domain]
        prompt, continuation = (" ".join(sample[part].split()) for part in ("prompt", "continuation"))
        lines.append(
            f"- *{domain}*, after `{prompt[-80:].replace('`', ' ')}`: {json.dumps(continuation[:240], ensure_ascii=False)}"
        )
    return "\n".join(lines)


def commands(stages: list[dict[str, Any]]) -> str:
    """The training commands, a line a stage: each goes on from the checkpoint of the one before."""
    lines = []
    for number, stage in enumerate(stages):
        budget = f"--minutes {stage['minutes']:g}" if stage["minutes"] else f"--steps {stage['steps']}"
        boost = "".join(f" --boost {domain}={factor:g}" for domain, factor in stage["domain_boost"].items())
        again = " --new-stage" if number else ""
        lines.append(f"    python -m training.train_embedded --corpus domains.parquet {budget}{again}{boost}")
    return "\n".join(lines)


def off_domain(accuracy: dict[str, float]) -> str:
    """One sentence on how far the model leaves its domain, against the bar that it was meant to meet."""
    below = [f"{domain} ({share:.1f})" for domain, share in accuracy.items() if share < CONTINUATION_BAR]
    if not below:
        return f"Of the continuations of a domain up to {1 - min(accuracy.values()):.0%} read like those of another."
    return f"It was meant to stay in its domain {CONTINUATION_BAR} of the time and misses that in {', '.join(below)}."


def card(documents: list[Document], config: PreTrainedConfig, results: dict[str, Any]) -> str:
    recipe, training, routing = Recipe(), results["training"], results["routing"]
    continuations = results["continuations"]
    E, K, L = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    active = results["parameters"] - L * (E - K) * expert
    settings = f"temperature {continuations['temperature']}, top-p {continuations['top_p']}, no `<eos>`"
    cache, tokens = f"{routing['capacity_experts']} of {E} experts", f"{routing['tokens']:,}"
    passes = training["tokens"] / training["held_in_tokens"]
    return f"""---
license: cc-by-sa-4.0
pipeline_tag: text-generation
library_name: transformers
---

# The embedded model of Swapless

A very small Mixture-of-Experts language model, trained by this project on two CPU cores, that ships inside the package so that
every command has something real to run on: real routing, real experts, text that stays in its domain. It is **no assistant**:
it knows nothing worth asking, follows no instruction, and its chat template only joins the messages.

## Architecture

`{config.model_type}` as transformers has it, stored in the usual one-tensor-an-expert layout, bfloat16.

{
        table(
            ["what", "value"],
            [
                ["parameters", f"{results['parameters']:,}"],
                ["of these used for one token", f"{active:,}"],
                ["MoE layers (L); no dense layers", str(L)],
                ["routed experts a layer (E), used a token (K)", f"{E}, {K}"],
                ["hidden size (D), expert inner size (F)", f"{config.hidden_size}, {config.moe_intermediate_size}"],
                ["bytes of one expert", f"{2 * expert:,}"],
                [
                    "attention heads, key-value heads, head size",
                    f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
                ],
                ["vocabulary (byte-level BPE), embeddings tied", str(config.vocab_size)],
                ["context", f"{config.max_position_embeddings} tokens"],
            ],
        )
    }

## Data and licence

About nine tenths of the documents were trained on; the rest is held out by a hash of domain and text (`training/split.py`), at
least three documents a domain. The tokenizer was trained on held-in text only.

{data_table(documents)}

Part of the text is share-alike (CC-BY-SA-3.0, which allows adaptations under a later version, and CC-BY-SA-4.0), so the weights
and tokenizer are given under **CC-BY-SA-4.0**, with the attributions above. MedQuAD asks for attribution (CC-BY-4.0); The
Algorithms and GSM8K are under the MIT licence, whose copyright notices are those of their repositories; TinyStories is under
CDLA-Sharing-1.0. The code of the project has its own licence.

## Recipe

{commands(training["stages"])}
    python -m training.evaluate_embedded --corpus domains.parquet
    python -m training.card --corpus domains.parquet

{
        table(
            ["what", "value"],
            [
                ["steps", f"{training['step']:,}"],
                ["tokens", f"{training['tokens']:,}"],
                ["training time (two threads, float32)", f"{training['elapsed_s'] / 60:.1f} minutes"],
                [
                    "speed (both CPU cores shared with other busy processes)",
                    f"{training['tokens'] / training['elapsed_s']:,.0f} tokens/s",
                ],
                ["seed", str(recipe.seed)],
                [
                    "batch",
                    f"{recipe.rows} windows of {recipe.window_tokens} tokens; "
                    f"in the last {1 - recipe.long_from:.0%} of the budget {recipe.long_rows} of {recipe.long_window_tokens}",
                ],
                ["domain weights", f"training tokens to the power {recipe.domain_power}; each batch mixes the domains"],
                [
                    "optimiser",
                    f"AdamW, peak rate {recipe.peak_lr}, {recipe.warmup_steps} warm-up steps, "
                    f"cosine to {recipe.final_lr_share:.0%}, weight decay {recipe.weight_decay} on matrices, "
                    f"gradient norm at most {recipe.max_grad_norm}",
                ],
                [
                    "balance loss",
                    f"coefficient {recipe.balance_coefficient}, each MoE layer over the mixed batch, never one sequence",
                ],
                ["final training loss of one batch", f"{training['loss']:.3f} nats a token"],
            ],
        )
    }

`--minutes` counts from the very beginning: a later stage goes on where the earlier one ended, with the weights of domains that
strayed raised by `--boost`. With `--minutes` the learning rate follows the clock, so that another run gives other bits; with
`--steps` a run can be repeated bit for bit on one machine.

## Measures

All on held-out text; full figures in `results.json`. Loss is measured in windows of 256 tokens. Mean over domains:
**{results["held_out_mean_nats_per_token"]:.3f} nats a token, {results["held_out_mean_bits_per_byte"]:.3f} bits a byte**.

*Continuations*: {continuations["per_domain"]} a domain, {continuations["continuation_tokens"]} tokens sampled
({settings}) after the first {continuations["prompt_tokens"]} tokens of held-out documents. Tiny domains have fewer
held-out documents than that; these then serve again with other samples. A linear classifier on character n-grams, trained on
held-in passages, names the domain from the continuation alone (temperature and top-p, which the model ships with, were chosen
with a look at this measure): **{continuations["accuracy_mean"]:.3f}** right on average,
{min(continuations["accuracy"].values()):.1f} in the worst domain.

{domain_results(results)}

*Routing*: entropy of the expert load over log E (1 is even; "equal shares" counts every domain alike), and the hit rate of an
LRU cache of {cache} in each MoE layer, all K experts of a token judged on the state before it, over
{tokens} tokens, whole documents in random order. Beside it the same tokens shuffled: equal load, no locality. Overall
**{routing["lru_hit_rate"]:.3f} against {routing["lru_hit_rate_shuffled"]:.3f}: a lead of {routing["lru_lead"]:.3f}**. (With the
documents domain after domain the hit rate is {routing["lru_hit_rate_documents_by_domain"]:.3f}.)

{layer_results(routing)}

The first continuation of three domains, not chosen:

{samples(results, ("stories", "code-python", "wiki-de"))}

## Limits

- {off_domain(continuations["accuracy"])}
- It writes plausible-looking text and false statements. Medical and legal text above all must not be believed.
- Its routing, learnt from seventeen sharply different kinds of text, shows that the machinery works; it does not predict the
  hit rate of another model.
- Most training windows had 256 tokens; far beyond that the text loses its thread.
- The budget was {
        passes:.2f} times the held-in tokens, small domains more and large ones less: it is undertrained, and more time
  would lower every loss.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the Parquet file that the model was trained on")
    parser.add_argument("--model", type=Path, default=PACKAGE_DATA, help="folder with config.json and results.json")
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.model)
    results = json.loads((args.model / "results.json").read_text())
    (args.model / "MODEL_CARD.md").write_text(card(read_documents(args.corpus), config, results))


if __name__ == "__main__":
    main()
