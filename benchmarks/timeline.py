"""Does the timeline foresee how fast the engine decodes? Probe, prediction and run in one process, round by round.

    python benchmarks/timeline.py                # about 6 minutes; needs the checkpoint of benchmarks/make_checkpoint.py
    python benchmarks/timeline.py --quick        # one round of few tokens, nothing stored: only to see that it runs

In each of five rounds the checkpoint is loaded four times: once with every expert resident, where the time of a token, and of
the experts in it, is measured after a rehearsal; and at three capacities, each a memory budget of its own. There the tokens
are decoded a few at a time, and before, between and after these pieces the read path is probed (``store/probe``), because the
bandwidth of a shared disk drifts within seconds. The engine's own trace of that run is then replayed by ``cache/timeline``
with the engine's own policy, the probed device and the compute times of the same round. Misses must agree exactly; tokens a
second, as medians over the rounds, within 20 %.

What stands for the device: bytes over seconds of all probes of the run, at the engine's own number of reads in flight, each
read copied from the bounce buffer to a slot's place as the reader threads do. What compute loses beside reads is measured in
the same pauses: experts of the loaded model are computed alone, then while as many threads read and copy as in the engine; the
ratio of the two rates is the timeline's ``pace_beside_reads``, and what those threads read meanwhile, over the bandwidth alone,
its ``reading_beside_compute``. Nothing is taken from the run's own times. What a hypervisor took away meanwhile (``steal`` of
/proc/stat) is stored beside the figures.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from results import document, emit, store

from swapless.cache import DEFAULT_POLICY
from swapless.cache.devices import DeviceProfile
from swapless.cache.replay import replay
from swapless.cache.timeline import BlockTime, timeline
from swapless.plan.traffic import busy
from swapless.store.checkpoint import Extent
from swapless.store.probe import probe
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

CAPACITIES = (12, 20, 32)
"""Experts a MoE layer, of 64 and with 8 needed at once."""
WITHIN = 0.20
PROBE_S = 0.15
CONTEXT = 256
PACE_S = 0.08
_PLACES = 16


class Disk:
    """The checkpoint's shards, probed with blocks as large as the engine's own reads, into places that no cache holds.

    With ``copied`` a read is over when its bytes have been copied to such a place, as an expert's are into its slot; else it is
    made straight into one, as a packed block is.
    """

    def __init__(self, folder: Path, block_bytes: int, copied: bool = False) -> None:
        files = sorted(folder.glob("*.safetensors"))
        self._reader = FileReader(files)
        self.direct = self._reader.direct
        self._rng = np.random.default_rng(0)
        self._files = [(file, file.stat().st_size) for file in files]
        self._block_bytes = block_bytes
        self._copied = copied
        self._places = [aligned_buffer(block_bytes + 2 * BLOCK_BYTES) for _ in range(_PLACES)]
        for place in self._places:
            place[:] = 1
        self._next = itertools.count()

    @property
    def nbytes(self) -> int:
        """Memory that it holds beside the reads under way: none of it is the engine's."""
        return sum(place.nbytes for place in self._places)

    def read(self, path: Path, offset: int, nbytes: int, out: np.ndarray) -> np.ndarray:
        """As :class:`~swapless.store.read.FileReader` does, to a place of its own; a view into it, or into ``out``."""
        place = self._places[next(self._next) % _PLACES]
        if not self._copied:
            return self._reader.read(path, offset, nbytes, place)
        got = self._reader.read(path, offset, nbytes, out)
        place[: len(got)] = got
        return got

    def _extent(self, rng: np.random.Generator) -> Extent:
        file, size = self._files[int(rng.integers(len(self._files)))]
        return Extent(file, int(rng.integers(0, size - self._block_bytes)), self._block_bytes)

    def read_s_per_byte(self, depth: int) -> float:
        """Seconds a byte takes at ``depth`` reads in flight, now, at random places."""
        extents = [self._extent(self._rng) for _ in range(256)]
        seed = int(self._rng.integers(1 << 30))
        found = probe(self, extents, held_bytes=0, budget_s=PROBE_S, seed=seed)  # type: ignore[arg-type]
        return 1 / found.bytes_per_s[depth]

    def busy(self, depth: int) -> AbstractContextManager[list[int]]:
        """Keep ``depth`` threads reading for as long as this is open; the list receives the bytes of every read."""

        def fetcher() -> Callable[[np.random.Generator], int]:
            buffer = aligned_buffer(self._block_bytes + 2 * BLOCK_BYTES)
            return lambda rng: len(self.read(*self._extent(rng), buffer))

        return busy([fetcher() for _ in range(depth)], self._rng)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def stolen_s() -> float:
    """Seconds that the hypervisor gave to others while a processor of this machine had work, since boot, all processors."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


class ExpertsClock:
    """Time spent in the experts of all blocks, by hooks on their modules."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        self._begun = 0.0
        modules = [module for module in model.modules() if hasattr(module, "swapless_moe_layer")]
        self._hooks = [module.register_forward_pre_hook(self._begin) for module in modules]
        self._hooks += [module.register_forward_hook(self._end) for module in modules]

    def _begin(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun

    def remove(self) -> None:
        """No longer listen."""
        for hook in self._hooks:
            hook.remove()


class Run:
    """A loaded model that decodes given tokens; ``given`` says how much it may hold, and by which policy."""

    def __init__(self, folder: Path, threads: int, context: int, **given: Any) -> None:
        import torch

        import swapless

        torch.set_num_threads(threads)
        self._torch = torch
        self.model: Any = swapless.load(folder, context=context, **given)
        self.engine = self.model.swapless

    def prefill(self, ids: list[int]) -> None:
        """Begin a text."""
        with self._torch.inference_mode():
            output = self.model(input_ids=self._torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values

    def decode(self, tokens: list[int]) -> list[float]:
        """Seconds of each token's forward call."""
        seconds = []
        with self._torch.inference_mode():
            for token in tokens:
                ids = self._torch.tensor([[token]])
                begun = time.perf_counter()
                self.model(input_ids=ids, past_key_values=self._cache, use_cache=True)
                seconds.append(time.perf_counter() - begun)
        return seconds

    def experts_per_s(self) -> float:
        """Experts of one token that are computed a second, now, from what the slots hold."""
        modules = [module for module in self.model.modules() if hasattr(module, "swapless_moe_layer")]
        hidden = self._torch.ones((1, self.model.config.hidden_size), dtype=self.model.dtype)
        blocks = itertools.cycle(range(self.engine.budget.slots))
        done, begun = 0, time.perf_counter()
        with self._torch.inference_mode():
            while (spent := time.perf_counter() - begun) < PACE_S:
                for module in modules:
                    self.engine._experts(module, module.swapless_moe_layer, [next(blocks)], [hidden])
                done += len(modules)
        return done / spent

    def close(self) -> None:
        """Give everything back."""
        self.engine.close()
        del self.model, self.engine, self._cache
        gc.collect()


def compute_times(folder: Path, asked: argparse.Namespace, tokens: dict[str, list[int]]) -> dict[str, float]:
    """A token's time with every expert resident, and what of it is experts."""
    run = Run(folder, asked.threads, CONTEXT, resident=1.0, policy=asked.policy)
    run.prefill(tokens["prompt"])
    run.decode(tokens["warm_up"] + tokens["decode"])  # reads what the timed pass will use
    run.prefill(tokens["prompt"])
    run.decode(tokens["warm_up"])
    run.engine.reset_stats()
    clock = ExpertsClock(run.model)
    stolen = stolen_s()
    token_s = run.decode(tokens["decode"])
    stolen = stolen_s() - stolen
    clock.remove()
    reads = run.engine.stats().decode_reads
    run.close()
    if reads:
        raise SystemExit(f"{reads} experts were read although all are resident")
    return {"token_s": statistics.fmean(token_s), "experts_s": clock.seconds / len(token_s), "stolen_s": stolen / len(token_s)}


def at_capacity(
    folder: Path, asked: argparse.Namespace, tokens: dict[str, list[int]], capacity: int, compute: dict[str, float]
) -> dict[str, Any]:
    """Run one capacity with probes in between, and predict it."""
    run = Run(folder, asked.threads, CONTEXT, resident=capacity / asked.experts, policy=asked.policy)
    engine = run.engine
    depth = engine.probe.depth
    disk = Disk(folder, engine.probe.block_bytes, copied=True)
    run.prefill(tokens["prompt"])
    run.decode(tokens["warm_up"])
    engine.reset_stats()
    token_s: list[float] = []
    reads: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    moved_beside: list[float] = []
    stolen = 0.0

    def pause() -> None:
        reads.append(disk.read_s_per_byte(depth))
        alone.append(run.experts_per_s())
        begun = time.perf_counter()
        with disk.busy(depth) as moved:
            beside.append(run.experts_per_s())
        moved_beside.append(sum(moved) / (time.perf_counter() - begun))

    pause()
    for first in range(0, len(tokens["decode"]), asked.piece):
        before_s = stolen_s()
        token_s += run.decode(tokens["decode"][first : first + asked.piece])
        stolen += stolen_s() - before_s
        pause()
    disk.close()
    stats, trace, budget = engine.stats(), engine.trace(), engine.budget
    policy = engine._cache.policy
    run.close()
    expert_bytes = budget.expert_bytes
    bandwidth = 1 / statistics.fmean(reads)
    device = DeviceProfile(name="this machine", bytes_per_s=bandwidth, queue_depth=depth, source="store/probe")
    layers, top_k = trace.num_moe_layers, trace.top_k
    block = BlockTime(
        attention_s=(compute["token_s"] - compute["experts_s"]) / layers,
        shared_s=0.0,
        expert_s=compute["experts_s"] / layers / top_k,
        pace_beside_reads=min(1.0, sum(beside) / sum(alone)),
        reading_beside_compute=min(1.0, statistics.fmean(moved_beside) / bandwidth),
    )
    before = len(tokens["prompt"]) + len(tokens["warm_up"])
    counted = replay(trace, policy, capacity, warmup_tokens=before)
    if (counted.requests, counted.hits) != (stats.requests, stats.hits):
        replayed, done = f"{counted.hits} of {counted.requests}", f"{stats.hits} of {stats.requests}"
        raise SystemExit(f"the replay hits {replayed}, the engine hit {done}")
    foreseen = timeline(trace, policy, capacity, device, block=block, warmup_tokens=before, expert_bytes=expert_bytes)
    return {
        "capacity_experts": capacity,
        "policy": policy.name,
        "budget_bytes": budget.total_bytes,
        "hit_rate": stats.hit_rate,
        "bytes_read_per_token": stats.decode_bytes_read / stats.decode_tokens,
        "depth": depth,
        "read_bytes_per_s": bandwidth,
        "probed_bytes_per_s": [1 / one for one in reads],
        "experts_per_s_alone": alone,
        "experts_per_s_beside_reads": beside,
        "read_bytes_per_s_beside_compute": moved_beside,
        "pace_beside_reads": block.pace_beside_reads,
        "reading_beside_compute": block.reading_beside_compute,
        "run_bytes_per_stall_s": stats.decode_bytes_read / stats.decode_stall_s if stats.decode_stall_s else None,
        "predicted_tokens_per_s": foreseen.tokens_per_s,
        "predicted_stall_s_per_token": foreseen.row()["stall_s_per_token"],
        "tokens_per_s": len(token_s) / sum(token_s),
        "stall_s_per_token": stats.decode_stall_s / stats.decode_tokens,
        "stolen_s_per_token": stolen / len(token_s),
    }


def summarise(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, capacity by capacity."""
    rows = []
    for capacity in CAPACITIES:
        mine = [row for one in rounds for row in one["runs"] if row["capacity_experts"] == capacity]
        predicted, measured = (
            statistics.median(row[name] for row in mine) for name in ("predicted_tokens_per_s", "tokens_per_s")
        )
        ratios = sorted(row["predicted_tokens_per_s"] / row["tokens_per_s"] for row in mine)
        rows.append(
            {
                "capacity_experts": capacity,
                "budget_bytes": mine[0]["budget_bytes"],
                "predicted_tokens_per_s": predicted,
                "tokens_per_s": measured,
                "ratio": predicted / measured,
                "ratio_of_rounds": ratios,
                "met": abs(predicted / measured - 1) <= WITHIN,
            }
        )
        print(
            f"{capacity:3d} experts a layer, {mine[0]['budget_bytes'] / 1e9:.2f} GB: predicted {predicted:.2f}, measured "
            f"{measured:.2f} tok/s, ratio {predicted / measured:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})  "
            f"{'met' if rows[-1]['met'] else 'MISSED'}",
            file=sys.stderr,
        )
    return rows


def arguments(description: str, warm_up: int) -> argparse.ArgumentParser:
    """Options of a benchmark that decodes the checkpoint's tokens a few at a time, with probes in between."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/bench-3gb"))
    parser.add_argument("--layout", default="original", help="original or fused")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="timed tokens of each run")
    parser.add_argument("--warm-up", type=int, default=warm_up, help="tokens before the clock starts")
    parser.add_argument("--piece", type=int, default=4, help="tokens between two probes")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, nothing stored")
    return parser


def main() -> None:
    """Measure, print a table and one JSON document, store the result."""
    parser = arguments(__doc__.split("\n")[0], warm_up=8)
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.tokens = 1, min(asked.tokens, 8)
    folder = asked.checkpoint / asked.layout
    asked.experts = json.loads((folder / "config.json").read_text())["num_experts"]
    given = json.loads((asked.checkpoint / "tokens.json").read_text())
    first = asked.warm_up
    tokens = {
        "prompt": given["prompt"],
        "warm_up": given["decode"][:first],
        "decode": given["decode"][first : first + asked.tokens],
    }
    from transformers.utils import logging

    logging.disable_progress_bar()
    rounds = []
    for number in range(asked.rounds):
        compute = compute_times(folder, asked, tokens)
        turn = number % len(CAPACITIES)
        runs = [at_capacity(folder, asked, tokens, c, compute) for c in (*CAPACITIES[turn:], *CAPACITIES[:turn])]
        rounds.append({"compute": compute, "runs": runs})
        for row in runs:
            print(
                f"round {number + 1}: {row['capacity_experts']:3d} experts, hit {row['hit_rate']:.3f}, predicted "
                f"{row['predicted_tokens_per_s']:.2f}, measured {row['tokens_per_s']:.2f} tok/s; ms a token: resident "
                f"{1e3 * compute['token_s']:.0f}, stall {1e3 * row['stall_s_per_token']:.0f}, stolen "
                f"{1e3 * row['stolen_s_per_token']:.0f}; pace {row['pace_beside_reads']:.2f}, reads' "
                f"{row['reading_beside_compute']:.2f}, depth {row['depth']}, "
                f"{1e-6 * row['read_bytes_per_s']:.0f} MB/s",
                file=sys.stderr,
                flush=True,
            )
    config = {name: value for name, value in vars(asked).items() if name not in ("checkpoint", "quick")}
    result = document("timeline", config=config, measured={"rows": summarise(rounds), "rounds": rounds}, data=folder)
    emit(result)
    if not asked.quick:
        store(result)


if __name__ == "__main__":
    main()
