"""The page of ``swapless simulate``: hit rate, bytes and speed over capacity, and where a token's time goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from swapless.atomic import write_text
from swapless.report.figures import GREY, Chart, layout, line, with_legend
from swapless.report.prefetch import losses, prefetch_chart, series

_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#ea580c", "#4f46e5", "#b91c1c")
_OPTIMA = {"belady": "Belady (optimum)", "belady_bypass": "Belady with bypass (optimum)"}

Row = dict[str, Any]


def charts_of(rows: list[Row]) -> list[Chart]:
    """All charts in their order on the page."""
    charts = [
        _over_capacity(
            "hit_rate",
            rows,
            "Hit rate over capacity",
            "Share of requests whose expert was resident. The dashed line knows the future: no policy gets above it.",
            "hit rate",
            lambda row: row["hit_rate"],
            percent=True,
        ),
        _over_capacity(
            "bytes",
            rows,
            "Bytes read a token",
            "What the link must carry, reads ahead among it. A hit rate means little beside this figure.",
            "GB a token",
            _gigabytes,
        ),
    ]
    if any(row.get("tokens_per_s") for row in rows):
        device = rows[0]["device"]
        charts += [
            _over_capacity(
                "speed",
                rows,
                f"Tokens a second on {device}",
                "Compute beside reads, every byte charged. Grey: the floor, the larger of compute and the optimum's bytes over "
                "the bandwidth.",
                "tokens a second",
                lambda row: row["tokens_per_s"],
                floor=lambda row: 1 / row["floor_s_per_token"],
            ),
            _time_chart(rows),
        ]
    if any(row.get("prefetch") for row in rows):
        charts.append(prefetch_chart(rows))
    return charts


def _gigabytes(row: Row) -> float | None:
    moved = row.get("bytes_moved_per_token", row["bytes_read_per_token"])
    return None if moved is None else moved / 1e9


def _over_capacity(
    name: str,
    rows: list[Row],
    title: str,
    reading: str,
    unit: str,
    value: Callable[[Row], float | None],
    *,
    percent: bool = False,
    floor: Callable[[Row], float] | None = None,
) -> Chart:
    data, table = [], []
    shown = ".1%" if percent else ".3f"
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for place, label in enumerate(dict.fromkeys(series(row) for row in rows)):
        own = sorted((row for row in rows if series(row) == label), key=lambda row: row["capacity_fraction"])
        policy, ahead = own[0]["policy"], own[0].get("prefetch") is not None
        best = policy in _OPTIMA
        data.append(
            line(
                label.replace(policy, _OPTIMA[policy], 1) if best else label,
                [row["capacity_fraction"] for row in own],
                [value(row) for row in own],
                "#0f172a" if best else _COLOURS[policies.index(policy) % len(_COLOURS)],
                dash="dashdot" if ahead else "dash" if best else "solid",
                mode="lines+markers",
                text=[f"{row['capacity_experts']} experts" for row in own],
                hover=f"%{{text}}: %{{y:{shown}}}<extra>%{{fullData.name}}</extra>",
            )
        )
        if floor is not None and place == 0:
            share = [row["capacity_fraction"] for row in own]
            data.append(
                line("floor", share, [floor(row) for row in own], GREY, dash="dot", hover=f"%{{y:{shown}}}<extra>floor</extra>")
            )
        table += [[label, row["capacity_experts"], row["capacity_fraction"], value(row)] for row in own]
    axis = {"tickformat": ".0%", "rangemode": "tozero"}
    frame = layout("share of the experts held", unit, percent=percent, xaxis=axis, yaxis={"rangemode": "tozero"}, height=380)
    return Chart(
        name=name,
        title=title,
        reading=reading,
        figure=with_legend(data, frame, a_line=1 if any(row.get("prefetch") for row in rows) else 2),
        columns=("policy", "capacity_experts", "capacity_fraction", name),
        rows=table,
    )


def _time_chart(rows: list[Row]) -> Chart:
    names = [f"{series(row)}, {row['capacity_fraction']:.0%}" for row in rows]
    parts = (("compute_s_per_token", "compute", "#2563eb"), ("stall_s_per_token", "stall: compute waits for a read", "#f59e0b"))
    data = [
        {
            "type": "bar",
            "name": label,
            "orientation": "h",
            "y": names,
            "x": [row[part] * 1e3 for row in rows],
            "marker": {"color": colour},
            "hovertemplate": "%{y}: %{x:.2f} ms<extra>%{fullData.name}</extra>",
        }
        for part, label, colour in parts
    ]
    axis = {"autorange": "reversed", "automargin": True}
    frame = layout("ms a token", "", percent=False, barmode="stack", yaxis=axis, height=max(380, 120 + 20 * len(rows)))
    return Chart(
        name="time",
        title="Where a token's time goes",
        reading="A better policy shortens the stall, never the compute; overlap can at best hide the shorter of the two.",
        figure=with_legend(data, frame, a_line=1),
        columns=("row", "compute_s_per_token", "stall_s_per_token"),
        rows=[[name, *(row[part] for part, _, _ in parts)] for name, row in zip(names, rows)],
    )


def write_page(path: str | os.PathLike[str], rows: list[Row], *, name: str) -> None:
    """Write the page, whole or not at all.

    Parameters
    ----------
    path : path
        File to write.
    rows : list of dict
        Rows of ``swapless simulate --json``.
    name : str
        What the trace is called.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    charts = charts_of(rows)
    loader = PackageLoader("swapless.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    figures = json.dumps([{"name": chart.name, **chart.figure} for chart in charts], allow_nan=False).replace("<", "\\u003c")
    template = environment.get_template("simulate.html.j2")
    text = template.render(name=name, charts=charts, rows=rows, losses=losses(rows), figures=figures, plotly=get_plotlyjs())
    write_text(path, text)
