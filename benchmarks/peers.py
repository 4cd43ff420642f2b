"""Swapless beside what one would run instead, under the same enforced memory limit, on a model that routes like a real one.

    python benchmarks/peers.py --trace deepseek-v2-lite.puffin.parquet --llama-python VENV/bin/python
    python benchmarks/peers.py --trace ... --llama-python ... --quick       # 4 small layers, one round, nothing stored

The checkpoint is ``benchmarks/make_realistic.py``'s: qwen3moe, 16 layers, hidden size 2048, 128 experts of 768, top-8. All
decode the same teacher-forced tokens, each in a process of its own inside a memory cgroup that counts page cache, from cold
files, in rounds whose order rotates:

- llama.cpp (``llama-cpp-python``), memory-mapped, a GGUF file of the same shapes (Q4_0, Q8_0): with everything resident as it
  comes, under a cap with weight repacking on and off, of which the faster counts;
- transformers on the fused layout, memory-mapped, ``eager`` and ``grouped_mm``, of which the faster counts;
- accelerate, experts on disk, reading the same fused files;
- Swapless in bf16 on the fused layout, and packed in 8 and 4 bits, with other weights as they are and in 8 bits.

Caps are shares of the Q4_0 file's bytes. The floor of a Swapless run is the larger of its compute (a token of the resident
runs) and the bytes that it read over the bandwidth probed in that same run. Artefacts are made in groups and removed after
use, so that the disk never holds all of them; free disk is looked at first. Peers are optional: ``pip install llama-cpp-python
gguf`` in an environment of their own, named by ``--llama-python``; without it llama.cpp is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cgroup import CappedRun, die_tidily, run_capped
from contestant import Task
from make_realistic import QUICK, Shape, make
from page_cache import evict, warm
from results import ROOT, document, emit, spread, store
from rich.console import Console
from rich.table import Table

from swapless.runtime.packing import pack
from swapless.store.packed import read_manifest

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
MARGIN_BYTES = 50_000_000
"""What the budget of Swapless stays below the cap."""
BASE_BYTES = 600_000_000
"""Added to the caps of ``--quick``, whose model is smaller than any interpreter."""
SHARES = (0.35, 0.70)
MOST_DISK_BYTES = 45e9
LEFT_OUT_BELOW = 0.5
"""Of the fastest of its kind in the first round; what is slower is not run again."""


class Contestant(NamedTuple):
    """A line of the table: what runs (``llama`` or an engine of ``contestant.py``), on which artefact, with what options."""

    name: str
    kind: str
    artefact: str
    options: dict[str, Any]


class Group(NamedTuple):
    """Contestants whose artefacts are on disk at the same time."""

    name: str
    contestants: tuple[Contestant, ...]

    @property
    def artefacts(self) -> list[str]:
        """Files and folders that are made for it, each once."""
        return list(dict.fromkeys(contestant.artefact for contestant in self.contestants))


def _llama(kind: str) -> list[Contestant]:
    return [
        Contestant(f"llama.cpp {kind}", "llama", f"{kind.lower()}.gguf", {"repack": True}),
        Contestant(f"llama.cpp {kind}, not repacked", "llama", f"{kind.lower()}.gguf", {"repack": False}),
    ]


def _packed(bits: int) -> list[Contestant]:
    return [
        Contestant(f"swapless int{bits}", "swapless", f"int{bits}", {}),
        Contestant(f"swapless int{bits}, others int8", "swapless", f"int{bits}-dense8", {}),
    ]


GROUPS = (
    Group(
        "4 bits and bf16",
        (
            *_llama("Q4_0"),
            Contestant("transformers eager", "plain", "fused", {"implementation": "eager"}),
            Contestant("transformers grouped_mm", "plain", "fused", {"implementation": "grouped_mm"}),
            Contestant("accelerate disk", "accelerate", "fused", {"implementation": "eager"}),
            Contestant("swapless bf16", "swapless", "fused", {}),
            *_packed(4),
        ),
    ),
    Group("8 bits", (*_llama("Q8_0"), *_packed(8))),
)


class Bench:
    """One run of the benchmark: settings, the token sequence, and every measurement."""

    def __init__(self, options: argparse.Namespace, shape: Shape) -> None:
        self.folder: Path = options.out
        self.shape = shape
        self.threads: int = options.threads
        self.time_limit_s: float = options.time_limit
        self.llama: str | None = options.llama_python
        tokens = json.loads((self.folder / "tokens.json").read_text())
        self.prompt: list[int] = tokens["prompt"]
        self.warm_up: list[int] = tokens["decode"][: options.warm_up]
        self.decode: list[int] = tokens["decode"][options.warm_up :][: options.tokens]
        self.runs: list[dict[str, Any]] = []
        self.left_out: set[str] = set()

    def prepare(self, artefact: str) -> dict[str, int]:
        """Make an artefact if it is not there; returns its bytes by part."""
        path, source = self.folder / artefact, self.folder / "fused"
        if artefact.endswith(".gguf"):
            if not path.exists():
                command = [str(self.llama), str(ROOT / "benchmarks" / "write_gguf.py"), str(source), str(path)]
                subprocess.run([*command, "--type", path.stem.upper()], check=True, stdout=subprocess.DEVNULL)
            return {"all": path.stat().st_size}
        if artefact != "fused":
            bits = int(artefact.removeprefix("int").split("-")[0])
            pack(source, path, bits=bits, dense_bits=8 if artefact.endswith("dense8") else 16)
            manifest = read_manifest(path)
            experts = sum(layer.num_experts * layer.block_bytes for layer in manifest.moe_layers)
            return {"experts": experts, "others": int(manifest.files["model.safetensors"]["bytes"])}
        return {
            "experts": 2 * self.shape.moe_layers * self.shape.experts * self.shape.expert_weights,
            "others": 2 * self.shape.other_weights,
        }

    def run(self, phase: str, round_: int, who: Contestant, cap: int | None) -> float | None:
        """One process: kept whole in ``runs``; its tokens a second, None if it failed, which is a result too."""
        path = self.folder / who.artefact
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        (evict if cap is not None else warm)(files)
        sequence = {"prompt": self.prompt, "warm_up": self.warm_up, "decode": self.decode, "threads": self.threads}
        rehearsals = 0 if cap is not None else 1
        limit_s = self.time_limit_s
        if who.kind == "llama":
            task = sequence | who.options | {"file": str(path), "context": 1024, "rehearsals": rehearsals}
            script, python, argument = "llama_contestant.py", str(self.llama), json.dumps(task | {"time_limit_s": limit_s})
        else:
            given = Task(engine=who.kind, folder=str(path), **sequence, **who.options)
            given = replace(given, rehearsals=rehearsals, time_limit_s=limit_s, context=1024)
            if who.kind == "swapless":
                given = replace(given, memory_bytes=cap - MARGIN_BYTES) if cap is not None else replace(given, resident=1.0)
            script, python, argument = "contestant.py", sys.executable, given.argument()
        command = [python, str(ROOT / "benchmarks" / script), argument]
        done = run_capped(command, cap, timeout_s=300 + limit_s * (1 + rehearsals), env=os.environ | {"HF_HUB_OFFLINE": "1"})
        answer = json.loads(done.stdout) if done.returncode == 0 else None
        entry = {"phase": phase, "round": round_, "name": who.name, "memory": done.figures(), "answer": answer}
        self.runs.append(entry if answer else entry | {"why": _why(done)})
        speed = f"{answer['tokens_per_s']:8.2f} tok/s" if answer else f"failed: {_why(done)[-160:]}"
        peak = (done.max_usage_bytes or done.max_anon_bytes) / 1e6
        CONSOLE.print(f"  round {round_ + 1} {phase:>9} {who.name:<28} {speed}, peak {peak:.0f} MB", markup=False)
        return float(answer["tokens_per_s"]) if answer else None

    def rounds(self, group: Group, caps: dict[str, int | None], rounds: int) -> None:
        """All contestants of a group, in every phase, round after round."""
        slow: dict[str, set[str]] = {phase: set() for phase in caps}
        for round_ in range(rounds):
            for phase, cap in caps.items():
                names = [who for who in _rotated(group.contestants, round_) if who.name not in slow[phase]]
                if cap is None:  # llama.cpp as it comes; and what would not fit the machine is no resident run
                    names = [who for who in names if who.options.get("repack", True)]
                    self.left_out |= {f"resident {who.name}: larger than memory" for who in names if not self.fits(who)}
                    names = [who for who in names if self.fits(who)]
                speeds = {who.name: self.run(phase, round_, who, cap) for who in names if who.kind != "llama" or self.llama}
                if round_ == 0:
                    slow[phase] = _clearly_slower(speeds)

    def fits(self, who: Contestant) -> bool:
        """Whether everything resident leaves half of a gigabyte of this machine's memory free."""
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + 0.5 * _cached_bytes()
        path = self.folder / who.artefact
        size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return size + 0.5e9 + BASE_BYTES < free


def _cached_bytes() -> float:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(float(line[1]) * 1024 for line in lines if line[0] == "Cached:")


def _why(done: CappedRun) -> str:
    return "killed for memory" if done.oom_killed else "timed out" if done.timed_out else " ".join(done.stderr.split())[-600:]


def _rotated(values: tuple[Contestant, ...], by: int) -> list[Contestant]:
    at = by % len(values)
    return [*values[at:], *values[:at]]


def _clearly_slower(speeds: dict[str, float | None]) -> set[str]:
    """Of each kind with variants (llama.cpp, transformers), those far behind its best; and what failed, which fails again."""
    slow = {name for name, speed in speeds.items() if speed is None}
    for kind in ("llama.cpp", "transformers"):
        of_kind = {name: speed for name, speed in speeds.items() if name.startswith(kind) and speed}
        slow |= {name for name, speed in of_kind.items() if speed < LEFT_OUT_BELOW * max(of_kind.values())}
    return slow


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a phase and contestant: spread of tokens a second, peak, and of Swapless the share of its floor."""
    rows = []
    for phase, name in dict.fromkeys((run["phase"], run["name"]) for run in runs):
        mine = [run for run in runs if (run["phase"], run["name"]) == (phase, name)]
        answers = [run["answer"] for run in mine if run["answer"]]
        peaks = [run["memory"]["max_usage_bytes"] or run["memory"]["max_anon_bytes"] for run in mine]
        row: dict[str, Any] = {"phase": phase, "name": name, "failed": len(mine) - len(answers), "peak_bytes": max(peaks)}
        if answers:
            row["tokens_per_s"] = spread([answer["tokens_per_s"] for answer in answers])
        stats = [answer for answer in answers if "stats" in answer]
        if stats:
            row["hit_rate"] = statistics.median(answer["stats"]["hit_rate"] or 0 for answer in stats)
            row["bytes_a_token"] = statistics.median(
                answer["stats"]["decode_bytes_read"] / answer["tokens"] for answer in stats
            )
            row["floor_share"] = _floor_share(runs, name, stats)
        rows.append(row)
    return rows


def _floor_share(runs: list[dict[str, Any]], name: str, answers: list[dict[str, Any]]) -> float | None:
    """Median of floor over measured time a token; the floor is the larger of compute and bytes over probed bandwidth."""
    resident = [run["answer"] for run in runs if run["name"] == name and run["phase"] == "resident" and run["answer"]]
    compute_s = statistics.median(1 / answer["tokens_per_s"] for answer in resident) if resident else 0.0
    shares = []
    for answer in answers:
        bandwidth = max(answer["probe"]["bytes_per_s"].values())
        read_s = answer["stats"]["decode_bytes_read"] / answer["tokens"] / bandwidth
        shares.append(max(compute_s, read_s) * answer["tokens_per_s"])
    return statistics.median(shares)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Swapless int4 over the peers, phase by phase, beside what was asked for."""

    def best(phase: str, start: str) -> float | None:
        of_kind = [row for row in rows if row["phase"] == phase and row["name"].startswith(start) and "tokens_per_s" in row]
        return max((row["tokens_per_s"]["median"] for row in of_kind), default=None)

    asked = (
        ("35 %", "llama.cpp Q4_0", 8.0, 20.0),
        ("35 %", "accelerate", 20.0, None),
        ("70 %", "llama.cpp Q4_0", 1.2, 2.0),
        ("resident", "llama.cpp Q4_0", 0.4, 1.0),
    )
    found = []
    for phase, peer, bar, goal in asked:
        ours, theirs = best(phase, "swapless int4"), best(phase, peer)
        got = ours / theirs if ours and theirs else None
        found.append({"phase": phase, "peer": peer, "ratio": got, "bar": bar, "goal": goal})
    return found


def show(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """The tables on stderr."""
    table = Table("phase", "contestant", "tok/s", "min-max", "hit rate", "MB a token", "of its floor", "peak MB")
    for row in rows:
        speed = row.get("tokens_per_s")
        table.add_row(
            row["phase"],
            row["name"],
            f"{speed['median']:.2f}" if speed else "failed",
            f"{speed['min']:.2f}-{speed['max']:.2f}" if speed else "",
            f"{row['hit_rate']:.3f}" if "hit_rate" in row else "",
            f"{row['bytes_a_token'] / 1e6:.1f}" if "bytes_a_token" in row else "",
            f"{row['floor_share']:.2f}" if row.get("floor_share") is not None else "",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    CONSOLE.print(table)
    for one in found:
        ratio = "not measured" if one["ratio"] is None else f"{one['ratio']:.2f}x"
        CONSOLE.print(f"swapless int4 over {one['peer']}, {one['phase']}: {ratio} (asked {one['bar']}x, goal {one['goal']}x)")


def main() -> int:
    """Make, measure, remove; tables on stderr, one JSON document on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="a recorded trace with tokens, whose routing is reproduced")
    parser.add_argument("--out", type=Path, default=Path("out/realistic"))
    parser.add_argument("--llama-python", default=None, help="an interpreter with llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--warm-up", type=int, default=32, help="decode tokens before the clock starts")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of decoding after which a run stops")
    parser.add_argument("--groups", nargs="*", default=[group.name for group in GROUPS], help="only these groups")
    parser.add_argument("--quick", action="store_true", help="small model, one round, few tokens, nothing stored")
    parser.add_argument("--keep", action="store_true", help="keep what was made")
    parser.add_argument("--no-store", action="store_true", help="print the result only")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens, options.warm_up, options.time_limit = 1, 12, 4, 10.0
        options.out = options.out.with_name(options.out.name + "-quick")
    die_tidily()
    shape = QUICK if options.quick else Shape()
    options.out.mkdir(parents=True, exist_ok=True)
    needed = min(MOST_DISK_BYTES, 2.2 * shape.total_bytes)
    free = shutil.disk_usage(options.out).free
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free")
    needed_tokens = options.warm_up + options.tokens
    manifest = make(options.out, options.trace, shape=shape, decode_tokens=max(needed_tokens, 0 if options.quick else 512))
    bench = Bench(options, shape)
    q4_bytes = 4.5 / 8 * shape.total_bytes / 2
    caps: dict[str, int | None] = {
        f"{100 * share:.0f} %": int(share * q4_bytes) + (BASE_BYTES + MARGIN_BYTES if options.quick else 0) for share in SHARES
    }
    sizes: dict[str, dict[str, int]] = {}
    try:
        for group in GROUPS:
            if group.name not in options.groups:
                continue
            wanted = [name for name in group.artefacts if not name.endswith(".gguf") or bench.llama]
            for artefact in wanted:
                CONSOLE.print(f"making {artefact}", markup=False)
                sizes[artefact] = bench.prepare(artefact)
            if group is GROUPS[0] and "q4_0.gguf" in sizes and not options.quick:
                caps = {f"{100 * share:.0f} %": int(share * sizes["q4_0.gguf"]["all"]) for share in SHARES}
            bench.rounds(group, caps | {"resident": None}, options.rounds)
            for artefact in wanted:
                if artefact != "fused" and not options.keep:
                    _remove(options.out / artefact)
    finally:
        if not options.keep:
            for made in (*sizes, "fused", "tokens.json", "manifest.json"):
                _remove(options.out / made)
            if not any(options.out.iterdir()):
                options.out.rmdir()
    rows = summarise(bench.runs)
    found = ratios(rows)
    show(rows, found)
    config = {
        "caps_bytes": caps,
        "margin_bytes": MARGIN_BYTES,
        "rounds": options.rounds,
        "threads": options.threads,
        "tokens": len(bench.decode),
        "warm_up_tokens": len(bench.warm_up),
        "checkpoint": manifest,
        "artefact_bytes": sizes,
        "left_out": sorted(bench.left_out),
        "llama.cpp": "n_gpu_layers 0, memory-mapped, use_extra_bufts as named" if bench.llama else "not installed: left out",
    }
    result = document("peers", config=config, measured={"ratios": found, "summary": rows, "runs": bench.runs})
    emit(result)
    if not (options.quick or options.no_store):
        CONSOLE.print(f"stored {store(result).name}")
    return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
