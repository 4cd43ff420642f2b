"""Charts of one trace each: MoE layers, experts and domains."""

from __future__ import annotations

from typing import Any

from swapless.report.figures import GREY, MOST_DOMAINS, Chart, Figure, layout
from swapless.report.results import Result, Row

RISING = [[0, "#f8fafc"], [0.25, "#bfdbfe"], [0.5, "#60a5fa"], [0.75, "#2563eb"], [1, "#1e3a8a"]]
AROUND = [[0, "#b45309"], [0.25, "#fbbf24"], [0.5, "#f8fafc"], [0.75, "#60a5fa"], [1, "#1e3a8a"]]


def heat(x: list[Any], y: list[Any], z: list[list[Any]], *, unit: str, **more: Any) -> Figure:
    """Heat map with a titled colour bar."""
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 14, "outlinewidth": 0, **more.pop("bar", {})}
    return {"type": "heatmap", "x": x, "y": y, "z": z, "colorbar": bar, "xgap": 1, "ygap": 1, **more}


def layer_chart(result: Result, number: int) -> Chart:
    """SRP of each MoE layer and segment length, above random routing."""
    segments = result.settings["segments"]
    rows = {(r["moe_layer"], r["segment_tokens"]): r for r in result.rows("srp", "moe_layer")}
    layers = list(range(result.layers))
    excess = [[_excess(rows[layer, m]) for layer in layers] for m in segments]
    largest = max([1e-9, *(abs(value) for line in excess for value in line if value is not None)])
    figure = heat(
        layers,
        [str(m) for m in segments],
        excess,
        unit="SRP above random",
        colorscale=AROUND,
        zmin=-largest,
        zmax=largest,
        bar={"tickformat": "+.0%"},
        hovertemplate="MoE layer %{x}, %{y} tokens: %{z:+.1%}<extra></extra>",
    )
    return Chart(
        name=f"layers_{number}",
        title="MoE layers",
        group=result.name,
        reading="How far each MoE layer's SRP stands above random routing of the same K and E: blue layers cache well, "
        "pale ones at chance level do not.",
        figure={
            "data": [figure],
            "layout": layout("MoE layer", "segment length (tokens)", percent=False, height=330, yaxis={"type": "category"}),
        },
        columns=("moe_layer", "segment_tokens", "srp", "random", "ci_low", "ci_high"),
        rows=[
            [layer, m, rows[layer, m]["value"], rows[layer, m]["chance"], rows[layer, m]["ci_low"], rows[layer, m]["ci_high"]]
            for layer in layers
            for m in segments
        ],
    )


def _excess(row: Row) -> float | None:
    return None if row["value"] is None else row["value"] - row["chance"]


def load_chart(result: Result, number: int) -> Chart:
    """Load of every expert as a multiple of the even share."""
    rows = result.rows("load_share", "expert")
    grid: list[list[float | None]] = [[None] * result.experts for _ in range(result.layers)]
    for row in rows:
        grid[row["moe_layer"]][row["expert"]] = None if row["value"] is None else row["value"] * result.experts
    figure = heat(
        list(range(result.experts)),
        list(range(result.layers)),
        grid,
        unit="times the even share",
        colorscale=RISING,
        zmin=0,
        hovertemplate="MoE layer %{y}, expert %{x}: %{z:.2f} times the even share<extra></extra>",
    )
    figure["xgap"] = figure["ygap"] = 0.5 if result.experts <= 128 else 0
    return Chart(
        name=f"load_{number}",
        title="Expert load",
        group=result.name,
        reading="Uses of each expert over the whole trace; 1 is an even share. A few dark experts a MoE layer are worth "
        "pinning; an even map leaves only locality in time to gain from.",
        figure={
            "data": [figure],
            "layout": layout("expert", "MoE layer", percent=False, height=max(280, min(720, 120 + 11 * result.layers))),
        },
        columns=("moe_layer", "expert", "load_share", "even_share"),
        rows=[[r["moe_layer"], r["expert"], r["value"], r["chance"]] for r in rows],
    )


def domain_chart(result: Result, number: int) -> Chart | None:
    """SRP and LRU of each domain, or None for fewer than two domains with a window of that length."""
    segment = result.shown_segment
    srp = [r for r in result.rows("srp", "model", domain="any", segment_tokens=segment) if r["domain"] is not None]
    measured = [r for r in srp if r["value"] is not None and r["value"] > 0]
    if len(measured) < 2:
        return None
    capacity = min(result.experts, max(1, round(result.settings["cache_ratios"][0] * result.top_k)))
    wanted = {"variant": "lru", "cold": "miss", "domain": "any", "capacity_experts": capacity}
    lru = {r["domain"]: r["value"] for r in result.rows("hit_rate", "layer_mean", **wanted)}
    overall = result.rows("srp", "model", segment_tokens=segment)[0]
    ordered = sorted(measured, key=lambda r: r["value"])
    half = MOST_DOMAINS // 2
    shown = ordered if len(ordered) <= MOST_DOMAINS else [*ordered[:half], *ordered[-half:]]
    names = [r["domain"] for r in shown]
    dots: Figure = {
        "type": "bar",
        "orientation": "h",
        "name": f"SRP {segment}",
        "x": [r["value"] for r in shown],
        "y": names,
        "marker": {"color": result.colour, "opacity": 0.85},
        "hovertemplate": "%{y}: SRP %{x:.1%}<extra></extra>",
    }
    cached: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": f"LRU, {capacity} of {result.experts} experts",
        "x": [lru.get(name) for name in names],
        "y": names,
        "marker": {"color": "#0f172a", "size": 8, "symbol": "diamond"},
        "hovertemplate": "%{y}: LRU %{x:.1%}<extra></extra>",
    }
    lines = [(overall["value"], "all", result.colour), (overall["chance"], "random SRP", GREY)]
    marks = [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": colour, "dash": "dot"}}
        for at, _, colour in lines
    ]
    notes = [
        {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text, "showarrow": False, "font": {"color": colour}}
        for at, text, colour in lines
    ]
    few = (
        ""
        if len(shown) == len(measured)
        else f" The {half} lowest and {half} highest of {len(measured)}; all are in the table."
    )
    return Chart(
        name=f"domains_{number}",
        title="Domains",
        group=result.name,
        reading=f"SRP over {segment} tokens (bars) and LRU hit rate (diamonds) of each domain.{few}",
        figure={
            "data": [dots, cached],
            "layout": layout(
                "SRP, hit rate",
                "",
                percent=False,
                height=150 + 19 * len(shown),
                xaxis={"tickformat": ".0%", "rangemode": "tozero"},
                yaxis={"automargin": True, "ticks": "", "tickfont": {"size": 11}, "dtick": 1},
                shapes=marks,
                annotations=notes,
                margin={"l": 24, "r": 24, "t": 28, "b": 84},
                bargap=0.35,
            ),
        },
        columns=("domain", "segment_tokens", "srp", "random", "capacity_experts", "lru"),
        rows=[[r["domain"], segment, r["value"], r["chance"], capacity, lru.get(r["domain"])] for r in reversed(ordered)],
        wide=True,
    )
