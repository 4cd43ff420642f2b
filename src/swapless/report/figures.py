"""Charts of the locality page: each is a Plotly figure with the values that it shows, and says what to read from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from swapless.report.results import Result

Figure = dict[str, Any]
GREY = "#64748b"
FONT = "Inter, system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
MOST_DOMAINS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart and its table.

    Parameters
    ----------
    name : str
        Identifier on the page, and the file name of its table.
    title, reading : str
        What it shows, and how to read it.
    figure : dict
        Plotly's ``data`` and ``layout``.
    columns, rows : sequence
        The plotted values.
    wide : bool
        Takes the whole width of the page.
    group : str
        Heading under which it stands; empty for charts that compare all traces.
    """

    name: str
    title: str
    reading: str
    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    wide: bool = False
    group: str = ""


def layout(x: str, y: str, *, percent: bool = True, height: int = 340, **more: Any) -> Figure:
    """Layout that all charts share: axis titles with units, legend below, quiet grid."""
    axis = {"gridcolor": "#e2e8f0", "zeroline": False, "linecolor": "#94a3b8", "ticks": "outside", "tickcolor": "#94a3b8"}
    return {
        "height": height,
        "margin": {"l": 64, "r": 24, "t": 12, "b": 64},
        "font": {"family": FONT, "size": 13, "color": "#0f172a"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "x": 0, "yanchor": "bottom", "font": {"size": 12}},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}, **more.pop("xaxis", {})},
        "yaxis": {**axis, "title": {"text": y}, **({"tickformat": ".0%"} if percent else {}), **more.pop("yaxis", {})},
        **more,
    }


def with_legend(data: Sequence[Figure], frame: Figure, *, a_line: int) -> Figure:
    """Figure whose frame grows by the lines that its legend takes."""
    entries = sum(trace.get("showlegend", True) for trace in data)
    more = 22 * -(-entries // a_line)
    frame["margin"] = {**frame["margin"], "b": frame["margin"]["b"] + more}
    frame["height"] += more
    return {"data": list(data), "layout": frame}


def line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, *, dash: str = "solid", **more: Any) -> Figure:
    """One line with its hover text."""
    return {
        "type": "scatter",
        "mode": more.pop("mode", "lines"),
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": more.pop("width", 2.25), "dash": dash},
        "hovertemplate": more.pop("hover", "%{x}: %{y:.1%}<extra>%{fullData.name}</extra>"),
        **more,
    }


def band(x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], colour: str) -> Figure:
    """Filled interval behind a line."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": colour + "26",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def segment_axis(results: Iterable[Result]) -> Figure:
    """Logarithmic axis with a tick at each measured segment length."""
    lengths = sorted({m for result in results for m in result.settings["segments"]})
    return {"type": "log", "tickvals": lengths, "ticktext": [str(m) for m in lengths]}


def srp_chart(results: list[Result]) -> Chart:
    """SRP over segment length, against both controls."""
    data, table = [], []
    for result in results:
        rows = result.rows("srp", "model")
        x = [row["segment_tokens"] for row in rows]
        known = [row for row in rows if row["ci_low"] is not None]
        if len(known) > 1:
            at, low, high = ([row[name] for row in known] for name in ("segment_tokens", "ci_low", "ci_high"))
            data.append(band(at, low, high, result.colour))
        data.append(line(result.name, x, [r["value"] for r in rows], result.colour, mode="lines+markers", width=3))
        mixed = result.rows("srp_shuffled", "model")
        data.append(
            line(f"{result.name}, tokens shuffled", x, [r["value"] for r in mixed], result.colour, dash="dash", width=1.5)
        )
        data.append(line(f"random top-{result.top_k} of {result.experts}", x, [r["chance"] for r in rows], GREY, dash="dot"))
        table += [
            [result.name, r["segment_tokens"], r["value"], r["ci_low"], r["ci_high"], s["value"], r["chance"]]
            for r, s in zip(rows, mixed)
        ]
    return Chart(
        name="srp",
        title="Segment routing best performance",
        reading="How well one on-or-off choice an expert and segment can follow the router. Only the distance to random "
        "routing speaks of locality: the dotted level depends on K and E alone, and the dashed "
        "one keeps the imbalance of the experts.",
        figure=with_legend(
            data,
            layout("segment length (tokens)", "SRP (F1)", xaxis=segment_axis(results), yaxis={"rangemode": "tozero"}),
            a_line=1,
        ),
        columns=("trace", "segment_tokens", "srp", "ci_low", "ci_high", "srp_shuffled", "srp_random"),
        rows=table,
    )


def sch_chart(results: list[Result]) -> Chart:
    """Look-ahead SCH over segment length at the asked cache sizes."""
    data, table = [], []
    dashes = ("solid", "dash", "dashdot", "longdash", "dot")
    for result in results:
        for place, ratio in enumerate(result.settings["cache_ratios"]):
            capacity = min(result.experts, max(1, round(ratio * result.top_k)))
            rows = result.rows("sch", "layer_mean", variant="lookahead", cold="free", capacity_experts=capacity)
            x, y = [r["segment_tokens"] for r in rows], [r["value"] for r in rows]
            dash = dashes[place % len(dashes)]
            name = f"{result.name}, {capacity} of {result.experts}"
            data.append(line(name, x, y, result.colour, dash=dash, mode="lines+markers"))
            random = [r["chance"] for r in rows]
            name = f"random, {capacity} of {result.experts}"
            data.append(line(name, x, random, GREY, dash=dash, width=1.25, showlegend=False))
            static = result.rows("sch", "layer_mean", variant="static", capacity_experts=capacity)
            for r, s in zip(rows, static):
                table.append([result.name, capacity, r["segment_tokens"], r["value"], r["chance"], s["value"], s["chance"]])
    return Chart(
        name="sch",
        title="Segment cache best hit rate",
        reading="A cache that knows which experts the next tokens use most. Mean over one cache a MoE layer; first uses that "
        "find a free slot count as hits, as published. Grey, in the same dashes: random routing.",
        figure=with_legend(
            data, layout("look-ahead (tokens)", "hit rate", xaxis=segment_axis(results), yaxis={"range": [0, 1.02]}), a_line=1
        ),
        columns=("trace", "capacity_experts", "segment_tokens", "sch_lookahead", "random", "sch_static", "random_static"),
        rows=table,
    )


def capacity_chart(results: list[Result]) -> Chart:
    """Hit-rate curves of the policies over the share of experts held."""
    data, table = [], []
    styles = {"belady": ("Belady", "dash"), "lru": ("LRU", "solid"), "lfu": ("LFU", "dashdot")}
    for result in results:
        curves = {name: result.rows("hit_rate", "layer_mean", variant=name, cold="miss") for name in styles}
        segment = result.shown_segment
        curves["sch"] = result.rows("sch", "layer_mean", variant="lookahead", cold="miss", segment_tokens=segment)
        share = [row["capacity_experts"] / result.experts for row in curves["lru"]]
        names = {**styles, "sch": (f"SCH {segment}", "dot")}
        for key, (label, dash) in names.items():
            width = 3 if key == "lru" else 1.75
            text = [f"{row['capacity_experts']} of {result.experts} experts" for row in curves[key]]
            hover = "%{text}: %{y:.1%}<extra>%{fullData.name}</extra>"
            y = [row["value"] for row in curves[key]]
            data.append(line(f"{result.name} {label}", share, y, result.colour, dash=dash, width=width, text=text, hover=hover))
        random = [row["chance"] for row in curves["lru"]]
        data.append(line(f"random top-{result.top_k} of {result.experts}, LRU", share, random, GREY, dash="dot", width=1.5))
        knee = result.verdict["knee_experts"]
        data.append(
            line(
                f"{result.name} knee",
                [knee / result.experts],
                [result.verdict["knee_hit_rate"]],
                result.colour,
                mode="markers",
                marker={"size": 11, "symbol": "diamond", "line": {"color": "white", "width": 1.5}},
                hover=f"knee: {knee} of {result.experts} experts, %{{y:.1%}}<extra></extra>",
            )
        )
        for place, row in enumerate(curves["lru"]):
            values = [curves[key][place]["value"] for key in ("lru", "lfu", "belady", "sch")]
            table.append([result.name, row["capacity_experts"], share[place], *values, row["chance"]])
    return Chart(
        name="hit_rate",
        title="Hit rate over cache size",
        reading="One cache a MoE layer, started empty at each document, first uses as misses. Belady knows the future and "
        "bounds what prediction could gain; a curve on the dotted line gains nothing from this model's routing.",
        figure=with_legend(
            data,
            layout(
                "share of the experts held",
                "hit rate",
                height=460,
                xaxis={"tickformat": ".0%", "range": [0, 1.01]},
                yaxis={"range": [0, 1.02]},
            ),
            a_line=4,
        ),
        columns=("trace", "capacity_experts", "share_of_experts", "lru", "lfu", "belady", "sch_lookahead", "random_lru"),
        rows=table,
        wide=True,
    )


def reuse_chart(results: list[Result]) -> Chart:
    """Experts touched by a window, as a share of all."""
    data, table = [], []
    for result in results:
        rows = result.rows("working_set", "layer_mean")
        within = result.rows("reuse_within", "layer_mean")
        x = [r["segment_tokens"] for r in rows]
        share = [None if r["value"] is None else r["value"] / result.experts for r in rows]
        random = [r["chance"] / result.experts for r in rows]
        data.append(line(f"{result.name}: experts touched", x, share, result.colour, mode="lines+markers", width=3))
        data.append(line(f"random top-{result.top_k} of {result.experts}: touched", x, random, GREY, dash="dot"))
        again = [r["value"] for r in within]
        data.append(line(f"{result.name}: used again within", x, again, result.colour, dash="dash", mode="lines+markers"))
        table += [[result.name, r["segment_tokens"], r["value"], r["chance"], w["value"]] for r, w in zip(rows, within)]
    return Chart(
        name="reuse",
        title="Working set and reuse",
        reading="Solid: share of a MoE layer's experts that a window of tokens touches (lower is better for a cache). "
        "Dashed: share of uses whose expert was last used at most so many tokens ago (higher is better).",
        figure=with_legend(
            data, layout("window (tokens)", "share", xaxis=segment_axis(results), yaxis={"range": [0, 1.02]}), a_line=1
        ),
        columns=("trace", "segment_tokens", "experts_touched", "experts_touched_random", "reuse_within"),
        rows=table,
    )


def balance_chart(results: list[Result]) -> Chart:
    """Evenness of the load within segments."""
    data, table = [], []
    for result in results:
        rows = result.rows("load_entropy", "layer_mean", variant="segment")
        trace = result.rows("load_entropy", "layer_mean", variant="trace")[0]["value"]
        x = [r["segment_tokens"] for r in rows]
        data.append(line(result.name, x, [r["value"] for r in rows], result.colour, mode="lines+markers", width=3))
        data.append(line(f"{result.name}, whole trace", x, [trace] * len(x), result.colour, dash="dash", width=1.5))
        random = [r["chance"] for r in rows]
        data.append(line(f"random top-{result.top_k} of {result.experts}", x, random, GREY, dash="dot"))
        table += [[result.name, r["segment_tokens"], r["value"], r["chance"], trace] for r in rows]
    return Chart(
        name="balance",
        title="Balance of the load within segments",
        reading="Entropy of the experts' load over its largest possible value: 100 % is an even load. A model may be even over "
        "a trace (dashed) and still use few experts at a time (solid, below random): that is what a cache lives on.",
        figure=with_legend(
            data,
            layout("segment length (tokens)", "entropy over ln E", xaxis=segment_axis(results), yaxis={"rangemode": "tozero"}),
            a_line=1,
        ),
        columns=("trace", "segment_tokens", "load_entropy", "random", "load_entropy_trace"),
        rows=table,
    )
