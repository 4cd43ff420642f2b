"""The tables of ``benchmarks/peers.py``: a row a phase and contestant, and the ratios that were asked for."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from results import spread
from rich.console import Console
from rich.table import Table

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 150)


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
            row["peak_below_budget"] = _below_budget(mine)
            row["budget_parts"] = stats[0]["budget"]["parts"]
        rows.append(row)
    return rows


def _floor_share(runs: list[dict[str, Any]], name: str, answers: list[dict[str, Any]]) -> dict[str, float]:
    """Floor over measured time a token: median, and the most that it could be; the floor is the larger of compute and reading.

    The most is a token whose compute and reads go on beside each other from its beginning and never wait for each other: while
    both do, each is as fast as it was beside the other, and what is left then has the machine to itself.
    """
    name = name.removesuffix(", reading ahead")
    resident = [run["answer"] for run in runs if run["name"] == name and run["phase"] == "resident" and run["answer"]]
    compute_s = statistics.median(1 / answer["tokens_per_s"] for answer in resident) if resident else 0.0
    shares, most = [], []
    for answer in answers:
        nbytes, rate = answer["stats"]["decode_bytes_read"] / answer["tokens"], _best_rate(answer["probed_bytes_per_s"])
        floor_s = max(compute_s, nbytes / rate if rate else 0.0)
        shares.append(floor_s * answer["tokens_per_s"])
        most += [floor_s / _together_s(nbytes, rate, one["beside_reads"], compute_s) for one in resident if rate]
    return {"median": statistics.median(shares)} | ({"most": statistics.median(most)} if most else {})


def _best_rate(probed: list[dict[str, float]]) -> float | None:
    """Bandwidth over all probes of a run at the best number of reads in flight; None where none was made.

    The best of each single probe would be its luckiest. Probes are so many seconds apart, not so many tokens, so rates are
    averaged and not times: what a reader that never rests gets out of a disk that drifts.
    """
    if not probed:
        return None
    return max(statistics.fmean(one[depth] for one in probed) for depth in probed[0])


def _together_s(nbytes: float, rate: float, beside: dict[str, float], compute_s: float) -> float:
    """Seconds of a token that needs both and never waits; what each takes from the other is a share, so that rounds compare."""
    computing_s = max(beside["token_s"], compute_s)
    reading = rate * min(1.0, beside["bytes_per_s"] / beside["alone_bytes_per_s"])
    read_s = nbytes / reading
    if read_s >= computing_s:
        return computing_s + (nbytes - reading * computing_s) / rate
    return read_s + (1 - read_s / computing_s) * compute_s


def _below_budget(runs: list[dict[str, Any]]) -> bool:
    """Whether every peak, page cache counted, was below the budget that the run was given."""
    answered = [(run["memory"]["max_usage_bytes"], run["answer"]["budget"]["total_bytes"]) for run in runs if run["answer"]]
    return all(peak is not None and peak <= total for peak, total in answered)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Swapless int4 over the peers, phase by phase, beside what was asked for; reading ahead is counted apart."""

    def best(phase: str, start: str, ahead: bool = False) -> float | None:
        of_kind = [row for row in rows if row["phase"] == phase and row["name"].startswith(start) and "tokens_per_s" in row]
        of_kind = [row for row in of_kind if ahead == row["name"].endswith("reading ahead")]
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
        ahead = best(phase, "swapless int4", ahead=True)
        got, got_ahead = (one / theirs if one and theirs else None for one in (ours, ahead))
        found.append({"phase": phase, "peer": peer, "ratio": got, "ratio_ahead": got_ahead, "bar": bar, "goal": goal})
    return found


def show(rows: list[dict[str, Any]], found: list[dict[str, Any]], sizes: dict[str, dict[str, int]]) -> None:
    """The tables on stderr."""
    for artefact, parts in sizes.items():
        said = ", ".join(f"{part} {nbytes / 1e6:.0f} MB" for part, nbytes in parts.items())
        CONSOLE.print(f"{artefact}: {said}", markup=False)
    table = Table("phase", "contestant", "tok/s", "min-max", "hit rate", "MB a token", "of its floor, of the most", "peak MB")
    for row in rows:
        speed = row.get("tokens_per_s")
        table.add_row(
            row["phase"],
            row["name"],
            f"{speed['median']:.2f}" if speed else "failed",
            f"{speed['min']:.2f}-{speed['max']:.2f}" if speed else "",
            f"{row['hit_rate']:.3f}" if "hit_rate" in row else "",
            f"{row['bytes_a_token'] / 1e6:.1f}" if "bytes_a_token" in row else "",
            " of ".join(f"{share:.2f}" for share in row.get("floor_share", {}).values()),
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    CONSOLE.print(table)
    for one in found:
        ratio = "not measured" if one["ratio"] is None else f"{one['ratio']:.2f}x"
        ahead = "" if one["ratio_ahead"] is None else f", reading ahead {one['ratio_ahead']:.2f}x"
        asked = f"(asked {one['bar']}x, goal {one['goal']}x)"
        CONSOLE.print(f"swapless int4 over {one['peer']}, {one['phase']}: {ratio}{ahead} {asked}")
