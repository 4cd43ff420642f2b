"""What reading ahead changes, in a chart and in words; where it loses, the words say so."""

from __future__ import annotations

from typing import Any

from swapless.report.figures import GREY, Chart, layout, line, with_legend

Row = dict[str, Any]
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2")
_NOTHING = 5e-4
"""A ratio this close to 1 is called no change."""


def series(row: Row) -> str:
    """Name of the line that a row belongs to."""
    return f"{row['policy']} + {_reader(row)}" if row.get("prefetch") else str(row["policy"])


def _reader(row: Row) -> str:
    when = "before the token" if row["lead"] == "token" else f"lead {row['lead']}"
    takes = row.get("predictor_s_per_token")
    return f"{row['prefetch']}, {when}" + (f", {takes * 1e3:g} ms a token" if takes else "")


def losses(rows: list[Row]) -> list[str]:
    """A sentence for each row that is slower, or moves more bytes, than without reading ahead, or has no room to; or that
    there is none."""
    ahead = [row for row in rows if row.get("prefetch") and row["tokens_per_s_ratio"] is not None]
    said = []
    for row in ahead:
        where = f"{row['policy']}, {row['capacity_fraction']:.0%} of the experts"
        if not row["staging_experts"]:
            said.append(f"{where}: no room to read ahead, for every MoE layer keeps its K.")
            continue
        speed, moved = row["tokens_per_s_ratio"] - 1, row["bytes_moved_per_token_ratio"]
        more = 0.0 if moved is None else moved - 1
        if speed < -_NOTHING or more > _NOTHING:
            what = (
                f"{_percent(speed, 'faster', 'slower', 'as fast')} and moves {_percent(more, 'more', 'fewer', 'as many')} bytes"
            )
            verdict = "loses" if speed < -_NOTHING else "costs bytes" if speed > _NOTHING else "gains nothing"
            said.append(f"{where}: {_reader(row)}, {verdict}: {what}.")
    if ahead and not said:
        return ["Reading ahead loses nowhere here: no row is slower or moves more bytes than the one without."]
    return said


def _percent(change: float, more: str, less: str, same: str) -> str:
    return same if abs(change) <= _NOTHING else f"{abs(change):.1%} {more if change > 0 else less}"


def prefetch_chart(rows: list[Row]) -> Chart:
    """Speed and bytes with reading ahead over those without, at equal memory, over capacity."""
    ahead = [row for row in rows if row.get("prefetch")]
    data, table = [], []
    parts = (("tokens_per_s_ratio", "speed", "solid"), ("bytes_moved_per_token_ratio", "bytes", "dash"))
    for place, name in enumerate(dict.fromkeys(series(row) for row in ahead)):
        own = sorted((row for row in ahead if series(row) == name), key=lambda row: row["capacity_fraction"])
        share, text = [row["capacity_fraction"] for row in own], [f"{row['capacity_experts']} experts" for row in own]
        for ratio, label, dash in parts:
            change = [None if row[ratio] is None else row[ratio] - 1 for row in own]
            hover = "%{text}: %{y:+.2%}<extra>%{fullData.name}</extra>"
            colour = _COLOURS[place % len(_COLOURS)]
            data.append(
                line(f"{name}: {label}", share, change, colour, dash=dash, mode="lines+markers", text=text, hover=hover)
            )
        counts = ("prefetch_useful", "prefetch_late", "prefetch_wasted", "staging_experts")
        table += [
            [name, row["capacity_experts"], share, *(row[ratio] for ratio, _, _ in parts), *(row[count] for count in counts)]
            for row, share in zip(own, share)
        ]
    ends = [min(row["capacity_fraction"] for row in ahead), max(row["capacity_fraction"] for row in ahead)]
    data.append(line("without reading ahead", ends, [0, 0], GREY, dash="dot", hover="<extra></extra>"))
    axis = {"tickformat": "+.1%", "automargin": True}
    frame = layout("share of the experts held", "change", percent=False, xaxis={"tickformat": ".0%"}, yaxis=axis, height=380)
    return Chart(
        name="prefetch",
        title="What reading ahead changes",
        reading="Against the same policy in the same memory: the room for what is read ahead is taken from the cache. Solid: "
        "tokens a second, above 0 is a gain. Dashed: bytes over the link, above 0 is a cost, wasted reads among them.",
        figure=with_legend(data, frame, a_line=1),
        columns=(
            "row",
            "capacity_experts",
            "capacity_fraction",
            "speed_ratio",
            "bytes_ratio",
            "useful",
            "late",
            "wasted",
            "staging",
        ),
        rows=table,
    )
