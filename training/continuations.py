"""Do the model's continuations stay in their domain? A classifier that never saw held-out text names the domain of each.

The classifier reads the continuation alone, never the prompt. Its accuracy on real held-out text stands beside: the ceiling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROMPT_TOKENS = 128
CONTINUATION_TOKENS = 200
CONTINUATIONS_PER_DOMAIN = 10
TRAINING_PASSAGES_PER_DOMAIN = 800
REAL_PASSAGES_PER_DOMAIN = 30


def sample_passages(tokenizer: PreTrainedTokenizerFast, stream: np.ndarray, count: int, rng: np.random.Generator) -> list[str]:
    """Random passages as long as a continuation, out of the token stream of one domain."""
    starts = rng.integers(len(stream) - CONTINUATION_TOKENS, size=count)
    passages = [stream[start : start + CONTINUATION_TOKENS] for start in starts]
    return tokenizer.batch_decode(passages, skip_special_tokens=True)


def train_classifier(passages: dict[str, list[str]]) -> Pipeline:
    """Character n-grams into a linear classifier; passages by domain."""
    vectoriser = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=3, max_features=60_000, sublinear_tf=True)
    classifier = make_pipeline(vectoriser, LinearSVC(random_state=0))
    labels = [domain for domain, texts in passages.items() for _ in texts]
    return classifier.fit([text for texts in passages.values() for text in texts], labels)


def held_out_prompts(stream: np.ndarray, eos: int) -> list[list[int]]:
    """The first ``PROMPT_TOKENS`` of ten held-out documents; with fewer long enough, documents come round again."""
    ends = np.flatnonzero(stream == eos)
    starts = [0, *(ends[:-1] + 1)]
    prompts = [
        stream[start : start + PROMPT_TOKENS].tolist()
        for start, end in zip(starts, ends, strict=True)
        if end - start >= PROMPT_TOKENS
    ]
    return [prompts[index % len(prompts)] for index in range(CONTINUATIONS_PER_DOMAIN)]


def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], seed: int
) -> list[str]:
    """Sample 200 tokens after each prompt with the model's own generation settings; <eos> is barred, none ends early."""
    torch.manual_seed(seed)
    ids = torch.tensor(prompts)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=CONTINUATION_TOKENS,
        max_new_tokens=CONTINUATION_TOKENS,
    )
    return tokenizer.batch_decode(output[:, PROMPT_TOKENS:], skip_special_tokens=True)


def judge_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held_in: dict[str, np.ndarray],
    held_out: dict[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Accuracy a domain on continuations and on real text, every confusion, and one sample a domain."""
    rng = np.random.default_rng(seed)
    classifier = train_classifier(
        {domain: sample_passages(tokenizer, stream, TRAINING_PASSAGES_PER_DOMAIN, rng) for domain, stream in held_in.items()}
    )
    accuracy, real_accuracy, confusion, samples = {}, {}, {}, {}
    for domain, stream in held_out.items():
        prompts = held_out_prompts(stream, tokenizer.eos_token_id)
        continuations = continue_prompts(model, tokenizer, prompts, seed)
        predicted = classifier.predict(continuations).tolist()
        real = classifier.predict(sample_passages(tokenizer, stream, REAL_PASSAGES_PER_DOMAIN, rng)).tolist()
        accuracy[domain] = predicted.count(domain) / len(predicted)
        real_accuracy[domain] = real.count(domain) / len(real)
        confusion[domain] = {other: predicted.count(other) for other in sorted(set(predicted))}
        samples[domain] = {"prompt": tokenizer.decode(prompts[0]), "continuation": continuations[0]}
    return {
        "per_domain": CONTINUATIONS_PER_DOMAIN,
        "prompt_tokens": PROMPT_TOKENS,
        "continuation_tokens": CONTINUATION_TOKENS,
        "temperature": model.generation_config.temperature,
        "top_p": model.generation_config.top_p,
        "accuracy": accuracy,
        "accuracy_mean": float(np.mean(list(accuracy.values()))),
        "accuracy_real_text": real_accuracy,
        "confusion": confusion,
        "samples": samples,
    }
