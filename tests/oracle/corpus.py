"""A corpus of four made-up domains, small enough to train on in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = {
    "birds": ["owl", "robin", "heron", "wing", "nest", "feather", "egg", "song", "tree"],
    "boats": ["mast", "sail", "keel", "harbour", "rope", "anchor", "tide", "deck", "oar"],
    "bread": ["flour", "yeast", "oven", "crust", "dough", "salt", "water", "knead", "bake"],
    "bugs": ["int", "return", "while", "void", "class", "import", "def", "self", "None"],
}


def write_corpus(path: Path, documents: int = 24, words: int = 60) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {"domain": domain, "source": "made", "licence": "none", "text": " ".join(rng.choice(vocabulary, words))}
        for domain, vocabulary in WORDS.items()
        for _ in range(documents)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 48,
    "space_rank": 4,
}
"""Changes that make `tiny` quick; MoE blocks in 1 and 2, four experts."""
MOE = {"moe_blocks": [1, 2], "num_experts": 4}
RECIPE = {
    "steps": 6,
    "warmup_steps": 2,
    "rows": 4,
    "window_tokens": 48,
    "fit_batches": 3,
    "rising_steps": 2,
    "peak_lr": 0.005,
    "precision": "no",
}
