"""What is asked of a trace, a predictor or a file of figures in a process of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np


def trace_measured(path: str, importer: str | None = None) -> str:
    """Digest of what a trace says once it was read, replayed and measured."""
    from swapless.cache import POLICIES
    from swapless.cache.replay import replay
    from swapless.trace.importers import load_trace, open_trace
    from swapless.trace.summary import summarize

    trace = load_trace(path, importer=importer, model_id="a/model")
    assert trace.expert_ids.min(initial=0) >= -1 and trace.expert_ids.max(initial=0) < trace.num_experts
    digest = hashlib.sha256(trace.expert_ids.tobytes() + trace.document.tobytes() + trace.position.tobytes())
    digest.update(repr((trace.tokens, trace.header.num_experts, trace.header.top_k, trace.header.moe_blocks)).encode())
    if len(trace):
        result = replay(trace.grouped(), POLICIES.get("lru")(), max(trace.top_k, 1))
        digest.update(repr(result).encode())
    if importer is None:
        with open_trace(path) as source:
            digest.update(repr(summarize(source).num_tokens).encode())
    return digest.hexdigest()


def trace_told(path: str) -> str:
    """What ``swapless info`` prints of a file."""
    from typer.testing import CliRunner

    from swapless.cli.main import app

    done = CliRunner().invoke(app, ["info", path])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert all(letter.isprintable() or letter in "\n\t" for letter in text), repr(text)
    return "told" if done.exit_code == 0 else "refused"


def predictor_asked(path: str) -> tuple[str, bool]:
    """Digest of a predictor's scores of a made trace, asked twice, and whether they are likelihoods."""
    from swapless.predict import load_predictor
    from tests.predict.made import made_trace

    trace = made_trace(lengths=(7, 1, 12), seed=5)
    found = []
    for _ in range(2):
        predictor = load_predictor(path)
        predictor.require_fitted().check(trace)
        found.append(predictor.scores_batch(trace, 1))
    fine = bool(np.isfinite(found[0]).all() and found[0].min() >= 0 and found[0].max() <= 1)
    assert found[0].tobytes() == found[1].tobytes(), "two runs of one file differ"
    return hashlib.sha256(found[0].tobytes()).hexdigest(), fine


def figures_kept(path: str) -> Any:
    """What is kept of a machine, None where it is measured anew."""
    from swapless.plan import machine

    found = machine._read(Path(path))
    if found is None:
        return None
    probe = found.read_at(1 << 20)
    values = [*probe.bytes_per_s.values(), found.copy_bytes_per_s, found.memory_bytes_per_s, *found.weights_per_s.values()]
    assert all(np.isfinite(value) and value > 0 for value in values)
    return found.to_dict()


def twin_computes(folder: str) -> str:
    """Digest of a twin's logits."""
    import torch

    import swapless

    with torch.no_grad(), swapless.load(folder, resident=0.5, context=64) as model:
        logits = model(torch.arange(3, 23)[None]).logits
        assert torch.isfinite(logits).all()
        return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
