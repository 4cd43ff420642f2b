"""llama.cpp in the peers' benchmark, in a process of its own: load a GGUF file, prefill, decode given tokens, report.

    python benchmarks/llama_contestant.py '{"file": "q4_0.gguf", "prompt": [1, 2], "decode": [3], ...}'

Started by ``benchmarks/peers.py`` with an interpreter that has ``llama-cpp-python``; nothing else is imported. It decodes the
same teacher-forced tokens as the other contestants, one call a token, and answers with the same fields.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp


def load(task: dict[str, Any]) -> tuple[Any, Any]:
    """Model and context: memory-mapped, no GPU; ``repack`` lets weights be copied into the layout of its own kernels."""
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = task["repack"]
    if hasattr(options, "load_mode"):
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    else:
        options.use_mmap = True
    model = llama_cpp.llama_model_load_from_file(task["file"].encode(), options)
    if not model:
        raise SystemExit("llama.cpp did not load the file")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = task["context"]
    settings.n_batch = settings.n_ubatch = max(32, len(task["prompt"]))
    settings.n_threads = settings.n_threads_batch = task["threads"]
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit("llama.cpp made no context")
    return model, context


def decode(context: Any, tokens: list[int]) -> None:
    """One call for ``tokens``, which follow those before."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
        raise SystemExit("llama_decode failed")


def likeliest(context: Any, vocabulary: int) -> int:
    """The token of the highest logit of the last call."""
    logits = ctypes.cast(llama_cpp.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float * vocabulary)).contents
    return max(range(vocabulary), key=logits.__getitem__)


def run(context: Any, task: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """One pass over the sequence from an empty cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    started = time.perf_counter()
    decode(context, task["prompt"])
    prefill_s = time.perf_counter() - started
    clock, warm_up_tokens = time.perf_counter(), 0
    for token in task["warm_up"]:
        decode(context, [token])
        warm_up_tokens += 1
        if task["time_limit_s"] is not None and time.perf_counter() - clock > task["time_limit_s"]:
            break
    token_s, greedy = [], []
    clock = time.perf_counter()
    for token in task["decode"]:
        started = time.perf_counter()
        decode(context, [token])
        token_s.append(time.perf_counter() - started)
        greedy.append(likeliest(context, vocabulary))
        if task["time_limit_s"] is not None and time.perf_counter() - clock > task["time_limit_s"]:
            break
    return {"prefill_s": prefill_s, "warm_up_tokens": warm_up_tokens, "token_s": token_s, "greedy": greedy}


def main() -> None:
    """Do the task of the command line; the answer is one JSON document on stdout."""
    task = json.loads(sys.argv[1])
    started = time.perf_counter()
    model, context = load(task)
    load_s = time.perf_counter() - started
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for _ in range(task["rehearsals"]):
        run(context, task, vocabulary)
    done = run(context, task, vocabulary)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    answer = done | {
        "load_s": load_s,
        "tokens": len(done["token_s"]),
        "tokens_per_s": len(done["token_s"]) / sum(done["token_s"]),
        "io_read_bytes": int(io["read_bytes"]),
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
