"""Swapless beside what one would run instead, under the same enforced memory limit, on a model that routes like a real one.

    python benchmarks/peers.py --trace deepseek-v2-lite.puffin.parquet --llama-python VENV/bin/python
    python benchmarks/peers.py --trace ... --llama-python ... --for 240     # stop after so long; the same command goes on
    python benchmarks/peers.py --trace ... --llama-python ... --quick       # 4 small layers, one round, nothing stored

The checkpoint is ``benchmarks/make_realistic.py``'s: qwen3moe, 16 layers, hidden size 2048, 128 experts of 768, top-8. All
decode the same teacher-forced tokens, each in a process of its own inside a memory cgroup that counts page cache, from cold
files, in rounds whose order rotates:

- llama.cpp (``llama-cpp-python``), memory-mapped, a GGUF file of the same shapes (Q4_0, Q8_0): with everything resident as it
  comes, under a cap with weight repacking on and off, of which the faster counts;
- transformers on the fused layout, memory-mapped, ``eager`` and ``grouped_mm``, of which the faster counts;
- accelerate, experts on disk, reading the same fused files;
- Swapless in bf16 on the fused layout, and packed in 8 and 4 bits, with other weights as they are, in 8 and, beside
  experts in 4, in 4 bits, the latter two also with reading ahead.

Caps are shares of the Q4_0 file's bytes. The floor of a Swapless run is the larger of its compute (a token of the resident
runs) and the bytes that it read over the bandwidth probed before, between and after its timed tokens, at the number of reads
in flight that was best over all of them. What of that floor can be reached is measured too: after a resident run, tokens are
decoded while a thread reads blocks that nobody waits for, so that neither ever waits for the other. Both the warm-up and the
timed tokens end early at ``--time-limit``, for all alike: a peer that needs seconds a token is timed over the few it gets
done, and whoever is below ``SLOW_TOKENS_PER_S`` in the first round runs in ``--slow-rounds`` rounds; llama.cpp, whom the
ratios are about, in all. Every run is kept in ``runs.jsonl`` as soon as it is done, so the rounds may be spread over
several calls; runs of Swapless made at another commit are made again.

Libraries are in the page cache beforehand, so that no run is charged for files that all use. Artefacts are made in groups
and removed after use, so that the disk never holds all of them; free disk is looked at first.
Peers are optional: ``pip install llama-cpp-python gguf`` in an environment of their own, named by ``--llama-python``; without
it llama.cpp is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cgroup import CappedRun, die_tidily, run_capped
from contestant import Task
from kept import Kept
from make_realistic import QUICK, WEIGHTS, Shape, make
from page_cache import cached_bytes, evict, warm
from peers_table import CONSOLE, ratios, show, summarise
from results import ROOT, document, emit, store

from swapless.runtime.packing import pack
from swapless.store.packed import read_manifest

MARGIN_BYTES = 50_000_000
"""What the budget of Swapless stays below the cap: places for the probes between its tokens, most of it."""
BASE_BYTES = 600_000_000
"""Added to the caps of ``--quick``, whose model is smaller than any interpreter."""
SHARES = (0.35, 0.70)
MOST_DISK_BYTES = 45e9
LEFT_OUT_BELOW = 0.5
"""Of the fastest of its kind in the first round; what is slower is not run again."""
SLOW_TOKENS_PER_S = 1.0
TIMEOUT_S = 240.0
"""A run that has not answered by then is one without a token."""
RUNS = "runs.jsonl"
AHEAD = "reading ahead"
"""The next layer's router asked ahead. This checkpoint's routing is easier to foresee than a real model's."""


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


def _packed(bits: int, dense_bits: int) -> list[Contestant]:
    name, artefact = f"swapless int{bits}, others int{dense_bits}", f"int{bits}-dense{dense_bits}"
    return [
        Contestant(name, "swapless", artefact, {}),
        Contestant(f"{name}, {AHEAD}", "swapless", artefact, {"prefetch": "gate"}),
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
            *_packed(4, 8),
            *_packed(4, 4),
        ),
    ),
    Group("4 bits, others bf16", (Contestant("swapless int4", "swapless", "int4", {}),)),
    Group("8 bits", (*_llama("Q8_0"), *_packed(8, 8))),
    Group("8 bits, others bf16", (Contestant("swapless int8", "swapless", "int8", {}),)),
)


class Bench:
    """One run of the benchmark: settings, the token sequence, and every measurement, kept as soon as it is there."""

    def __init__(self, options: argparse.Namespace, shape: Shape) -> None:
        self.folder: Path = options.out
        self.shape = shape
        self.threads: int = options.threads
        self.time_limit_s: float = options.time_limit
        self.llama: str | None = options.llama_python
        self.rounds: int = options.rounds
        self.slow_rounds: int = options.slow_rounds
        self.only: str = options.only
        tokens = json.loads((self.folder / "tokens.json").read_text())
        self.prompt: list[int] = tokens["prompt"]
        self.warm_up: list[int] = tokens["decode"][: options.warm_up]
        self.decode: list[int] = tokens["decode"][options.warm_up :][: options.tokens]
        self.left_out: set[str] = set()
        self.kept = Kept(self.folder / RUNS, options.stop_after)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What counts: all runs of peers, and those of Swapless at this commit."""
        return [run for run in self.kept.runs if run["commit"] == self.kept.commit or run["kind"] != "swapless"]

    def prepare(self, artefact: str) -> dict[str, int]:
        """Make an artefact if it is not there; returns its bytes by part."""
        path, source = self.folder / artefact, self.folder / "fused"
        if artefact.endswith(".gguf"):
            command = [str(self.llama), str(ROOT / "benchmarks" / "write_gguf.py"), str(source), str(path)]
            done = subprocess.run([*command, "--type", path.stem.upper()], check=True, capture_output=True)
            return json.loads(done.stdout)
        if artefact != "fused":
            bits = int(artefact.removeprefix("int").split("-")[0])
            pack(source, path, bits=bits, dense_bits=int(artefact.partition("-dense")[2] or 16))
            manifest = read_manifest(path)
            experts = sum(layer.num_experts * layer.block_bytes for layer in manifest.moe_layers)
            return {"experts": experts, "others": int(manifest.files["model.safetensors"]["bytes"])}
        return {
            "experts": 2 * self.shape.moe_layers * self.shape.experts * self.shape.expert_weights,
            "others": 2 * self.shape.other_weights,
        }

    def run(self, phase: str, round_: int, who: Contestant, cap: int | None) -> None:
        """One process: kept whole in ``runs`` and on disk; one that fails is a result too."""
        path = self.folder / who.artefact
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        (evict if cap is not None or who.kind == "swapless" else warm)(files)
        left = cached_bytes(files) if cap is not None else None
        sequence = {"prompt": self.prompt, "warm_up": self.warm_up, "decode": self.decode, "threads": self.threads}
        rehearsals = 0 if cap is not None else 1
        if who.kind == "llama":
            task = sequence | who.options | {"file": str(path), "context": 1024, "rehearsals": rehearsals}
            task["time_limit_s"] = self.time_limit_s
            script, python, argument = "llama_contestant.py", str(self.llama), json.dumps(task)
        else:
            given = Task(engine=who.kind, folder=str(path), **sequence, **who.options)
            given = replace(given, rehearsals=rehearsals, time_limit_s=self.time_limit_s, context=1024)
            if who.kind == "swapless":
                resident = {"resident": 1.0, "beside_reads": True}
                given = replace(given, **({"memory_bytes": cap - MARGIN_BYTES} if cap is not None else resident))
            script, python, argument = "contestant.py", sys.executable, given.argument()
        command = [python, str(ROOT / "benchmarks" / script), argument]
        done = run_capped(command, cap, timeout_s=TIMEOUT_S, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        answer = json.loads(done.stdout) if done.returncode == 0 else None
        entry = {"phase": phase, "round": round_, "name": who.name, "kind": who.kind}
        entry |= {"memory": done.figures(), "cached_before_bytes": left, "answer": answer}
        self.kept.add(entry if answer else entry | {"why": _why(done)})
        speed = f"{answer['tokens_per_s']:8.2f} tok/s" if answer else f"failed: {_why(done)[-160:]}"
        peak = (done.max_usage_bytes or done.max_anon_bytes) / 1e6
        CONSOLE.print(
            f"  round {round_ + 1} {phase:>9} {who.name:<28} {speed}, peak {peak:.0f} MB, {done.wall_s:.0f} s", markup=False
        )

    def missing(self, group: Group, caps: dict[str, int | None]) -> list[tuple[str, int, Contestant]]:
        """What is still to be run of a group, in order: round after round, in every phase."""
        found = []
        for round_ in range(self.rounds):
            for phase, cap in caps.items():
                names = [who for who in _rotated(group.contestants, round_) if self._takes_part(who)]
                if cap is None:  # llama.cpp as it comes, nothing to read ahead; what would not fit the machine is left out
                    names = [who for who in names if who.options.get("repack", True) and AHEAD not in who.name]
                    self.left_out |= {f"resident {who.name}: larger than memory" for who in names if not self.fits(who)}
                    names = [who for who in names if self.fits(who)]
                done = {(run["round"], run["name"]) for run in self.runs if run["phase"] == phase}
                drop = self.dropped(phase, round_)
                found += [(phase, round_, who) for who in names if (round_, who.name) not in done and who.name not in drop]
        return found

    def dropped(self, phase: str, round_: int) -> set[str]:
        """Who need not run in a later round: what failed, what another of its kind leaves behind, and what is slow."""
        first = {run["name"]: run["answer"] for run in self.runs if (run["phase"], run["round"]) == (phase, 0)}
        speeds = {name: answer["tokens_per_s"] if answer else None for name, answer in first.items()}
        if not round_:
            return set()
        slow = {name for name, speed in speeds.items() if (speed or 0) < SLOW_TOKENS_PER_S and not name.startswith("llama.cpp")}
        return _clearly_slower(speeds) | (slow if round_ >= self.slow_rounds else set())

    def _takes_part(self, who: Contestant) -> bool:
        return (who.kind != "llama" or self.llama is not None) and who.name.startswith(self.only)

    def measure(self, group: Group, caps: dict[str, int | None]) -> bool:
        """Run what is missing of a group; False if time ran out before."""
        while todo := self.missing(group, caps):
            if not self.kept.time_left():
                return False
            phase, round_, who = todo[0]
            self.run(phase, round_, who, caps[phase])
        return True

    def fits(self, who: Contestant) -> bool:
        """Whether three quarters of the machine's memory hold everything: what must page is no resident run."""
        path = self.folder / who.artefact
        size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return size + BASE_BYTES < 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def touch_libraries() -> None:
    """Have the libraries' files in the page cache before any capped run, as where other programs use them too.

    Who touches a page first is charged for it, so that otherwise the first run of each round would pay for all.
    """
    program = (
        "import accelerate, torch, swapless; from swapless import embedded; "
        "model = swapless.load(embedded.path(), resident=1.0); "
        "model.generate(torch.ones((1, 4), dtype=torch.long), max_new_tokens=4)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


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


def main() -> int:
    """Make, measure, remove; tables on stderr, one JSON document on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="a recorded trace with tokens, whose routing is reproduced")
    parser.add_argument("--out", type=Path, default=Path("out/realistic"))
    parser.add_argument("--llama-python", default=None, help="an interpreter with llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2, help="rounds of those below one token a second, llama.cpp apart")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--warm-up", type=int, default=64, help="decode tokens before the clock starts")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds after which warm-up and timed tokens end")
    parser.add_argument("--groups", nargs="*", default=[group.name for group in GROUPS], help="only these groups")
    parser.add_argument("--only", default="", metavar="NAME", help="only contestants whose name begins so, such as swapless")
    parser.add_argument("--phases", nargs="*", help="only these, such as '35 %%' or 'resident'")
    parser.add_argument("--for", dest="stop_after", type=float, help="begin no further run after so many seconds")
    parser.add_argument("--make-only", action="store_true", help="make the artefacts of the first group that is not done")
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
    room = shutil.disk_usage(options.out).free + sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    if room < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB of disk are needed, {room / 1e9:.1f} GB are free")
    needed_tokens = options.warm_up + options.tokens
    manifest = make(options.out, options.trace, shape=shape, decode_tokens=max(needed_tokens, 0 if options.quick else 512))
    bench = Bench(options, shape)
    touch_libraries()
    caps: dict[str, int | None] = {}
    sizes: dict[str, dict[str, int]] = {}
    for group in GROUPS:
        if group.name not in options.groups:
            continue
        wanted = [name for name in group.artefacts if not name.endswith(".gguf") or bench.llama]
        for artefact in wanted:
            CONSOLE.print(f"making {artefact}, if it is not there", markup=False)
            sizes[artefact] = bench.prepare(artefact)
        if options.make_only:
            return 0
        if not caps:
            whole = sum(sizes["q4_0.gguf"].values()) if "q4_0.gguf" in sizes else 4.5 / 8 * shape.total_bytes / 2
            more = BASE_BYTES + MARGIN_BYTES if options.quick else 0
            caps = {f"{100 * share:.0f} %": int(share * whole) + more for share in SHARES} | {"resident": None}
            caps = {phase: cap for phase, cap in caps.items() if options.phases is None or phase in options.phases}
            if not caps:
                raise SystemExit(f"no phase {options.phases}; there are 35 %, 70 % and resident")
        if not bench.measure(group, caps):
            CONSOLE.print("the same command goes on from here", markup=False)
            return 0
        for artefact in wanted:
            if artefact != "fused" and not options.keep:
                _remove(options.out / artefact)
    rows = summarise(bench.runs)
    found = ratios(rows)
    show(rows, found, sizes)
    config = {
        "caps_bytes": caps,
        "margin_bytes": MARGIN_BYTES,
        "rounds": options.rounds,
        "slow_rounds": options.slow_rounds,
        "threads": options.threads,
        "tokens": len(bench.decode),
        "warm_up_tokens": len(bench.warm_up),
        "time_limit_s": options.time_limit,
        "checkpoint": manifest,
        "artefact_bytes": sizes,
        "left_out": sorted(bench.left_out),
        "only": options.only,
        "llama.cpp": "n_gpu_layers 0, memory-mapped, use_extra_bufts as named" if bench.llama else "not installed: left out",
    }
    result = document("peers", config=config, measured={"ratios": found, "summary": rows, "runs": bench.runs})
    emit(result)
    if not (options.quick or options.no_store):
        CONSOLE.print(f"stored {store(result).name}")
    if not options.keep:
        for made in (*sizes, "fused", "tokens.json", "manifest.json", WEIGHTS, RUNS):
            _remove(options.out / made)
        if not any(options.out.iterdir()):
            options.out.rmdir()
    return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
