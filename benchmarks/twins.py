"""The trained twins in the engine: tokens a second, stalls and first token, by how many experts are in memory.

    python benchmarks/twins.py --twins switch=RUN/model,oracle=RUN/model

The tiny models' experts are read in a blink, so each is made wide first, its function and routing unchanged: every inner unit
of its feed-forwards is repeated N times, and what it adds is divided by N (a power of two, so the weights stay exact). The
record has the largest difference of logits that this makes and the tokens whose experts differ, which must be none. All twins
decode the same held-out text, made of three domains, token by token; each run is a process of its own that starts with the
files out of the page cache, and the order rotates from round to round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from cgroup import die_tidily
from contestant import Task, perform_apart
from results import ROOT, document, emit, spread, store
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import swapless.oracle  # noqa: F401 (the family, for transformers)
from swapless.oracle.corpus import domain_texts, read_documents, token_streams
from swapless.oracle.evaluate import held_out

CONSOLE = Console(stderr=True, width=140)
TIMEOUT_S = 300


def widen(folder: Path, times: int, out: Path) -> Path:
    """The same model with every inner unit ``times`` over (a power of two); returns ``out``."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, out)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= times
    (out / "config.json").write_text(json.dumps(config, indent=2))
    wide = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "up_proj" in name:  # weights and biases, of an expert stack or a dense layer
            axis = 1 if ".experts." in name else 0
            tensor = torch.cat([tensor] * times, dim=axis)
        elif "down_proj" in name and not name.endswith("bias"):
            tensor = torch.cat([tensor / times] * times, dim=-1)
        wide[name] = tensor.contiguous()
    save_file(wide, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def compare(narrow: Path, wide: Path, ids: list[int]) -> dict[str, Any]:
    """What widening changed, in float32 over one text."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (narrow, wide)]
    outs = [model(torch.tensor([ids]), use_cache=False) for model in models]
    differing = sum(int((a != b).any(dim=1).sum()) for a, b in zip(outs[0].expert_ids, outs[1].expert_ids, strict=True))
    return {
        "largest_logit_difference": float((outs[0].logits - outs[1].logits).abs().max()),
        "tokens_with_other_experts": differing,
        "tokens": len(ids),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of one twin at one residency."""
    stats = [run["stats"] for run in runs]
    return {
        "slots": runs[0]["budget"]["slots"],
        "tokens_per_s": spread([run["tokens_per_s"] for run in runs]),
        "token_s": statistics.median(statistics.mean(run["token_s"]) for run in runs),
        "first_token_s": spread([run["prefill_s"] for run in runs]),
        "stall_share": spread([s["decode_stall_s"] / s["decode_s"] for s in stats]),
        "hit_rate": stats[0]["hit_rate"],
        "bytes_a_token": stats[0]["decode_bytes_read"] / stats[0]["decode_tokens"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The trained twins in the engine, by residency.")
    parser.add_argument("--twins", required=True, metavar="NAME=MODEL,...", help="exported models of finished runs")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--times", type=int, default=32, help="how much wider; a power of two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192, help="timed decode tokens")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-store", action="store_true")
    arguments = parser.parse_args()
    die_tidily()
    twins = {name: Path(path) for name, path in (pair.split("=", 1) for pair in arguments.twins.split(","))}
    tokenizer = AutoTokenizer.from_pretrained(next(iter(twins.values())))
    measured: dict[str, Any] = {"twins": {}}
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        unseen = token_streams(domain_texts(read_documents(arguments.corpus), held_out=True), tokenizer, Path(scratch))
        text = held_out(unseen, window_tokens=8 + arguments.prompt_tokens + arguments.tokens, end=tokenizer.eos_token_id)
        ids = [int(token) for token in text.joined[0]]
        folders = {name: widen(path, arguments.times, Path(scratch) / name) for name, path in twins.items()}
        runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for name, folder in folders.items():
            experts = json.loads((folder / "config.json").read_text())["num_experts"]
            measured["twins"][name] = {"widened": compare(twins[name], folder, ids)}
            CONSOLE.print(f"{name}: {measured['twins'][name]['widened']}", markup=False)
            for share in (1 / experts, 0.25, 0.5, 1.0):
                runs[name, share] = []
        contestants = list(runs)
        for round_ in range(arguments.rounds):
            by = round_ % len(contestants)
            for name, share in contestants[by:] + contestants[:by]:
                cut = arguments.prompt_tokens
                task = Task(
                    engine="swapless",
                    folder=str(folders[name]),
                    prompt=ids[:cut],
                    warm_up=ids[cut : cut + 8],
                    decode=ids[cut + 8 :][: arguments.tokens],
                    threads=arguments.threads,
                    resident=share,
                    context=512,
                )
                runs[name, share].append(perform_apart(task, None, TIMEOUT_S))
        for (name, share), answers in runs.items():
            row = summary(answers)
            measured["twins"][name][f"{share:g}"] = row
            full = statistics.median(statistics.mean(run["token_s"]) for run in runs[name, 1.0])
            row["of_full_memory_token_time"] = row["token_s"] / full
            CONSOLE.print(f"{name} {share:.1%}: {json.dumps(row)}", markup=False)
        for name in folders:
            said = {tuple(run["greedy"]) for (twin, _), answers in runs.items() if twin == name for run in answers}
            if len(said) > 1:
                raise SystemExit(f"{name} says other things at another residency")
    config = {k: getattr(arguments, k) for k in ("times", "rounds", "tokens", "prompt_tokens", "threads")}
    result = document("twins", config=config | {"parts_of_text": text.parts[0]}, measured=measured)
    emit(result)
    if not arguments.no_store:
        CONSOLE.print(f"stored {store(result).name}")


if __name__ == "__main__":
    main()
