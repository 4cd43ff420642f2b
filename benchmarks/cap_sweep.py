"""The cap from outside: every family, long prompts, the smallest budget that ``load`` accepts and twice that.

    python benchmarks/cap_sweep.py                          # makes the checkpoints below out/, and runs what is missing
    python benchmarks/cap_sweep.py --for 240                # stop after so long; the same command goes on
    python benchmarks/cap_sweep.py --families gpt_oss jamba --forms int4 --prompts 8192 --times 1
    python benchmarks/cap_sweep.py --decode 20000           # instead: a long decode at 48 layers of 128 experts; is it flat?

A run is a process of its own in a memory cgroup of its own, whose limit is the budget, page cache counted: it loads, reads a
prompt, generates a few tokens, and says what it believes its peak was. Its budget is the smallest one, which a process without
a limit is told when it asks for a byte, or twice that. What the cgroup counted is what is true: a run fails where it was
killed or refused, and where its own figure is more than 3 % from the cgroup's. The models have random weights and the real
classes; they are small in all that costs time and large in what costs memory: 16 heads, 8,192 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cgroup import CappedRun, CgroupUnavailableError, die_tidily, memory_cgroup, run_capped
from kept import Kept
from results import ROOT, document, emit, store

PROMPTS = (512, 2048, 8192)
TIMES = (1, 2)
FORMS = ("bf16", "int4")
GENERATED = 8
WITHIN = 0.03

EAGER_TOO = ("qwen3_moe", "glm4_moe", "deepseek_v3", "qwen3_next")
"""Families that are run with eager attention besides the one that transformers chooses."""

FAMILIES = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "gemma4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
)

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
    "num_experts": 32,
    "num_local_experts": 32,
    "n_routed_experts": 32,
    "moe_num_experts": 32,
    "num_experts_per_tok": 4,
}
"""In place of the common sizes of the tests' tiny models."""

OWN: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"mamba_n_heads": 32},
    "gemma4": {"vocab_size_per_layer_input": 8192},
}
"""What has to fit these sizes in a family."""

LONG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


class Case(NamedTuple):
    """One run: family, attention (None is transformers' choice), form of the weights, tokens of the prompt, times the floor."""

    family: str
    attention: str | None
    form: str
    prompt: int
    times: int

    def named(self) -> dict[str, Any]:
        """What tells it from other runs."""
        return {"attention": self.attention} | {name: value for name, value in self._asdict().items() if name != "attention"}


def cases(asked: argparse.Namespace) -> Iterator[Case]:
    """All runs, a family after the other."""
    for family in asked.families:
        for attention in (None, "eager") if family in EAGER_TOO else (None,):
            for form in asked.forms:
                for prompt in asked.prompts:
                    for times in asked.times:
                        yield Case(family, attention, form, prompt, times)


def make(family: str, folder: Path, sizes: dict[str, Any]) -> None:
    """Write a random model of ``family`` in bf16, and the same packed in 4 bits, unless both are there."""
    if (folder / "done").exists():
        return
    import torch

    import swapless
    from tests.families import tiny

    common, rows = dict(tiny.COMMON), {name: dict(row) for name, row in tiny.OVERRIDES.items()}
    try:
        tiny.COMMON |= sizes
        row = tiny.OVERRIDES.setdefault(family, {})
        if row.get("num_key_value_heads") == common["num_attention_heads"]:  # as many as heads
            row["num_key_value_heads"] = sizes["num_attention_heads"]
        row |= {name: size for name, size in sizes.items() if name in row and name != "num_key_value_heads"}
        row |= OWN.get(family, {})
        model = tiny.tiny_model(tiny.decorated_families()[family])
    finally:
        tiny.COMMON.clear()
        tiny.COMMON |= common
        tiny.OVERRIDES.clear()
        tiny.OVERRIDES |= rows
    model.to(torch.bfloat16).save_pretrained(folder / "bf16")
    swapless.pack(folder / "bf16", folder / "int4", bits=4)
    (folder / "done").touch()


def worker(asked: dict[str, Any]) -> None:
    """One run in this process; prints what it did as JSON."""
    import torch
    from transformers.utils import logging

    import swapless
    from swapless.errors import BudgetError

    logging.disable_progress_bar()
    torch.set_num_threads(asked["threads"])
    try:
        model = swapless.load(
            asked["folder"],
            memory=asked["memory_bytes"],
            context=asked["context"],
            attn_implementation=asked["attention"],
            progress=_told,
        )
    except BudgetError as error:
        print(json.dumps({"refused": str(error)}))
        return
    ids = torch.randint(3, 500, (1, asked["prompt"]), generator=torch.Generator().manual_seed(0))
    held = []
    _told("prompt", 0)
    try:
        if asked["decode"]:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            for number in range(asked["decode"]):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                if number % 500 == 499:
                    held.append(_anonymous_bytes())
                    print(f"{number + 1} tokens, {held[-1] / (1 << 20):.1f} MiB", file=sys.stderr, flush=True)
        else:
            made = model.generate(ids, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False)
            assert made.shape[1] == asked["prompt"] + GENERATED
    except BudgetError as error:
        print(json.dumps({"refused": str(error)}))
        return
    budget = model.swapless.budget
    print(
        json.dumps(
            {
                "peak_bytes": model.swapless.stats().peak_memory_bytes,
                "parts": dict(budget.parts),
                "slots": budget.slots,
                "experts": budget.num_experts_total,
                "held": held,
            }
        )
    )


def _told(stage: str, done: float) -> None:
    """The last line of a run that is killed says where it was."""
    print(f"{stage}: {_anonymous_bytes() / (1 << 20):.1f} MiB", file=sys.stderr, flush=True)


def _anonymous_bytes() -> int:
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(row[1]) * 1024 for row in rows if row and row[0] == "RssAnon:")


def run(case: Case, folder: Path, memory_bytes: int, limit_bytes: int | None, **more: Any) -> tuple[CappedRun, dict[str, Any]]:
    """A worker's answer, and what was counted around it."""
    asked = {
        "folder": str(folder / case.form),
        "attention": case.attention,
        "prompt": case.prompt,
        "context": case.prompt + GENERATED,
        "memory_bytes": memory_bytes,
        "threads": 1,
        "decode": 0,
    } | more
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(asked)]
    ran = run_capped(command, limit_bytes, timeout_s=900 if not asked["decode"] else None)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    return ran, json.loads(lines[-1]) if lines else {}


def floors_of(asked: dict[str, Any]) -> None:
    """The budget that each refusal names, a line of JSON each: children of one process, which has imported what takes long."""
    import torch
    import transformers.modeling_utils  # noqa: F401

    import swapless
    import swapless.runtime.model
    from swapless.errors import BudgetError

    torch.set_num_threads(1)
    for name, folder, attention, context in asked["wanted"]:
        child = os.fork()
        if child == 0:
            try:
                swapless.load(folder, memory=1, context=context, attn_implementation=attention)
            except BudgetError as error:
                text = str(error)
                floor = int(text.partition("at least")[2].partition("(")[2].partition(" bytes")[0])
                print(json.dumps([name, floor]), flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)


def floors(wanted: list[tuple[str, str, str | None, int]]) -> dict[str, int]:
    """The smallest budget of each (name, folder, attention, context), by name."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps({"wanted": wanted})]
    ran = run_capped(command, None, timeout_s=900)
    found = dict(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("["))
    if len(found) < len(wanted):
        raise RuntimeError(f"no floor was named: {ran.stderr[-2000:]}")
    return found


def key(case: Case) -> str:
    """What the floor depends on."""
    return "/".join(map(str, (case.family, case.attention or "default", case.form, case.prompt)))


def measured(case: Case, folder: Path, floor: int) -> dict[str, Any]:
    """One line of the record."""
    budget = case.times * floor
    ran, answer = run(case, folder, budget, budget)
    peak, counted = answer.get("peak_bytes"), ran.max_usage_bytes
    return case.named() | {
        "floor_bytes": floor,
        "budget_bytes": budget,
        "killed": ran.oom_killed,
        "refused": answer.get("refused"),
        "returncode": ran.returncode,
        "cgroup_peak_bytes": counted,
        "reported_peak_bytes": peak,
        "ratio": round(peak / counted, 4) if peak and counted else None,
        "slots": answer.get("slots"),
        "experts": answer.get("experts"),
        "anonymous_peak_bytes": ran.max_anon_bytes,
        "seconds": round(ran.wall_s, 1),
        "error": None if answer else ran.stderr[-600:],
        "method": ran.method,
    }


def wrong(row: dict[str, Any]) -> str:
    """Why a run failed, or nothing."""
    if row["killed"]:
        return "killed"
    if row["refused"] or row["error"]:
        return "refused" if row["refused"] else "failed"
    if row["cgroup_peak_bytes"] is not None and row["cgroup_peak_bytes"] > row["budget_bytes"]:
        return "over its budget"
    if row["ratio"] is not None and abs(row["ratio"] - 1) > WITHIN:
        return "peak not as reported"
    return ""


def table(rows: list[dict[str, Any]]) -> str:
    """A line a family, attention and form: the worst of its runs, each as peak over budget."""
    heads = sorted({(row["prompt"], row["times"]) for row in rows}, key=lambda head: (head[1], head[0]))
    groups: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for row in rows:
        group = groups.setdefault((row["family"], row["attention"] or "default", row["form"]), {})
        share = "-" if row["cgroup_peak_bytes"] is None else f"{row['cgroup_peak_bytes'] / row['budget_bytes']:.3f}"
        group[row["prompt"], row["times"]] = f"{share} {wrong(row)}".strip()
    lines = ["| family | attention | weights |" + "".join(f" {prompt:,} tokens, {times}x |" for prompt, times in heads)]
    lines.append("|---" * (3 + len(heads)) + "|")
    for names, cells in sorted(groups.items()):
        lines.append(f"| {' | '.join(names)} |" + "".join(f" {cells.get(head, '')} |" for head in heads))
    bad = [row for row in rows if wrong(row)]
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    lines += ["", f"{len(rows)} runs of {len({row['family'] for row in rows})} families, {len(bad)} failed; the peak that was"]
    lines[-1] += f" reported over the cgroup's: {min(ratios):.3f} to {max(ratios):.3f}." if ratios else " reported: none."
    return "\n".join(lines)


def sweep(asked: argparse.Namespace) -> int:
    """All that is missing, and the table."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(asked.folder / "runs.jsonl", asked.stop_after)
    wanted = list(cases(asked))
    names = [case.named() for case in wanted]
    done = [row for row in kept.runs if {name: row[name] for name in names[0]} in names]
    missing = [case for case, name in zip(wanted, names, strict=True) if not any(name.items() <= row.items() for row in done)]
    began, number = time.monotonic(), 0
    for family in dict.fromkeys(case.family for case in missing):
        if not kept.time_left():
            break
        folder, mine = asked.folder / family, [case for case in missing if case.family == family]
        make(family, folder, SIZES)
        least = floors(list(dict.fromkeys((key(c), str(folder / c.form), c.attention, c.prompt + GENERATED) for c in mine)))
        with ThreadPoolExecutor(asked.jobs) as pool:
            rows = pool.map(measured, mine, [folder] * len(mine), [least[key(case)] for case in mine])
            for case, row in zip(mine, rows, strict=True):
                kept.add(row)
                done.append(row)
                number += 1
                left = (time.monotonic() - began) / number * (len(missing) - number)
                share = (row["cgroup_peak_bytes"] or 0) / row["budget_bytes"]
                print(
                    f"{number} of {len(missing)}, {left / 60:.0f} min left: {key(case)} {case.times}x "
                    f"{row['budget_bytes'] / (1 << 20):.0f} MiB: {share:.3f} {row['ratio']} {row['seconds']} s {wrong(row)}",
                    file=sys.stderr,
                    flush=True,
                )
    print(table(done))
    if len(done) == len(wanted) and not asked.quick:
        store(document("cap", config={"sizes": SIZES, "families": asked.families}, measured={"runs": done}))
    return int(any(wrong(row) for row in done))


def long_decode(asked: argparse.Namespace) -> int:
    """Many decode tokens of a model with 48 layers of 128 experts, in a cgroup: memory must not grow."""
    folder = asked.folder / "long"
    make("qwen3_moe", folder, LONG)
    case = Case("qwen3_moe", None, asked.forms[0], 64, 1)
    context = 64 + asked.decode
    floor = floors([("long", str(folder / case.form), None, context)])["long"]
    budget = floor + (32 << 20)
    ran, answer = run(case, folder, budget, budget, decode=asked.decode, context=context)
    held = answer.get("held", [])
    # Keys and values of what was decoded are part of what grows, and of the budget.
    cached = 2 * LONG["num_hidden_layers"] * LONG["num_key_value_heads"] * LONG["head_dim"] * 2
    flat = [nbytes - cached * 500 * number for number, nbytes in enumerate(held)]
    spread = max(flat[1:]) - min(flat[1:]) if len(flat) > 2 else None
    found = {
        "tokens": asked.decode,
        "budget_bytes": budget,
        "killed": ran.oom_killed,
        "cgroup_peak_bytes": ran.max_usage_bytes,
        "reported_peak_bytes": answer.get("peak_bytes"),
        "held_bytes": held,
        "spread_without_cache_bytes": spread,
        "seconds": round(ran.wall_s, 1),
        "error": None if answer else ran.stderr[-600:],
    }
    emit(document("cap_decode", config=LONG, measured=found))
    return int(ran.oom_killed or spread is None or spread > 8 << 20)


def main() -> int:
    """Run what was asked for; 1 where a run failed."""
    parser = argparse.ArgumentParser(description="Every family within its memory budget, counted from outside.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "cap", help="where checkpoints and runs are kept")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPTS), metavar="TOKENS")
    parser.add_argument("--times", nargs="+", type=int, default=list(TIMES), help="budgets, as multiples of the smallest")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each in a cgroup of its own")
    parser.add_argument("--for", dest="stop_after", type=float, metavar="SECONDS", help="begin no run after so long")
    parser.add_argument("--decode", type=int, metavar="TOKENS", help="a long decode instead")
    parser.add_argument("--quick", action="store_true", help="store nothing")
    asked = parser.parse_args()
    die_tidily()
    if asked.worker:
        given = json.loads(asked.worker)
        (floors_of if "wanted" in given else worker)(given)
        return 0
    sys.path.insert(0, str(ROOT))
    try:
        with memory_cgroup(1 << 30):
            pass
    except CgroupUnavailableError as error:
        print(f"Nothing is measured without a memory cgroup: {error}", file=sys.stderr)
        return 1
    return long_decode(asked) if asked.decode else sweep(asked)


if __name__ == "__main__":
    sys.exit(main())
