"""The page of ``swapless predict eval``: recall over width, MoE layer and position at each lead, and calibration."""

from __future__ import annotations

import json
import os
from typing import Any

from swapless.atomic import write_text
from swapless.report.figures import GREY, Chart, layout, line, with_legend

_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2")
_MOST_DOMAINS = 40

Row = dict[str, Any]


def charts_of(rows: list[Row]) -> list[Chart]:
    """All charts in their order on the page."""
    leads = list(dict.fromkeys(row["lead"] for row in rows))
    full = {row["lead"]: row for row in rows if row["moe_layer"] is None and "positions" in row}
    top_k = next(iter(full.values()))["width"]
    charts = [_width_chart(rows, leads), _layer_chart(rows, leads, top_k), _position_chart(full), _calibration_chart(full)]
    if any(len(row["domains"]) > 1 for row in full.values()):
        charts.append(_domain_chart(full))
    return charts


def _called(lead: Any) -> str:
    return "before the token" if lead == "token" else f"{lead} MoE layer{'s' if lead != 1 else ''} ahead"


def _lines(series: dict[Any, tuple[list[Any], list[Any]]], frame: dict[str, Any], *, mode: str = "lines+markers") -> Any:
    """One line a lead; leads that say the same share one, which would else hide the others."""
    alike: dict[str, list[Any]] = {}
    for lead, points in series.items():
        alike.setdefault(json.dumps(points), []).append(lead)
    data = []
    for place, leads in enumerate(alike.values()):
        name = "every lead" if len(leads) == len(series) > 1 else ", ".join(map(_called, leads))
        data.append(line(name, *series[leads[0]], _COLOURS[place % len(_COLOURS)], mode=mode))
    return with_legend(data, frame | {"showlegend": True}, a_line=2)


def _width_chart(rows: list[Row], leads: list[Any]) -> Chart:
    whole = [row for row in rows if row["moe_layer"] is None]
    own = {lead: [row for row in whole if row["lead"] == lead] for lead in leads}
    series = {lead: ([r["width"] for r in found], [r["recall"] for r in found]) for lead, found in own.items()}
    return Chart(
        name="width",
        title="Recall over experts fetched",
        reading="Share of the experts a token needs that are among the best scored of their layer. The first width is K; more "
        "width finds more and reads more that is never used: precision is in the table.",
        figure=_lines(series, layout("experts fetched a MoE layer", "recall", yaxis={"rangemode": "tozero"}, height=380)),
        columns=("lead", "width", "recall", "precision"),
        rows=[[str(r["lead"]), r["width"], r["recall"], r["precision"]] for r in whole],
    )


def _layer_chart(rows: list[Row], leads: list[Any], top_k: int) -> Chart:
    own = [row for row in rows if row["moe_layer"] is not None and row["width"] == top_k]
    series = {}
    for lead in leads:
        found = [row for row in own if row["lead"] == lead]
        series[lead] = ([row["moe_layer"] for row in found], [row["recall"] for row in found])
    return Chart(
        name="layer",
        title=f"Recall at K = {top_k} by MoE layer",
        reading="The first layers have no earlier layer of the same token to go by, so all leads agree there.",
        figure=_lines(series, layout("MoE layer", "recall", yaxis={"rangemode": "tozero"}, height=380)),
        columns=("lead", "moe_layer", "recall", "precision"),
        rows=[[str(r["lead"]), r["moe_layer"], r["recall"], r["precision"]] for r in own],
    )


def _position_chart(full: dict[Any, Row]) -> Chart:
    def label(bucket: Row) -> str:
        first, end = bucket["first"], bucket["end"]
        return f"{first}+" if end is None else f"{first}" if end == first + 1 else f"{first}-{end - 1}"

    series = {lead: ([label(b) for b in r["positions"]], [b["recall"] for b in r["positions"]]) for lead, r in full.items()}
    return Chart(
        name="position",
        title="Recall by position in the document",
        reading="Where little has been seen of a document, there is little to go by.",
        figure=_lines(
            series, layout("position", "recall", yaxis={"rangemode": "tozero"}, xaxis={"type": "category"}, height=380)
        ),
        columns=("lead", "position", "recall", "tokens"),
        rows=[[str(lead), label(b), b["recall"], b["tokens"]] for lead, r in full.items() for b in r["positions"]],
    )


def _calibration_chart(full: dict[Any, Row]) -> Chart:
    series = {
        lead: ([b["said"] for b in r["calibration"]], [b["chosen"] for b in r["calibration"]]) for lead, r in full.items()
    }
    figure = _lines(series, layout("score", "share chosen", xaxis={"tickformat": ".0%", "range": [0, 1]}, height=380))
    figure["data"].append(line("as said", [0, 1], [0, 1], GREY, dash="dot"))
    return Chart(
        name="calibration",
        title="Calibration",
        reading="Of the experts scored 70 %, are 70 % chosen? On the dotted line, scores can be weighed against bytes.",
        figure=figure,
        columns=("lead", "score", "share chosen", "share of all"),
        rows=[[str(lead), b["said"], b["chosen"], b["share"]] for lead, r in full.items() for b in r["calibration"]],
    )


def _domain_chart(full: dict[Any, Row]) -> Chart:
    data = []
    for place, (lead, row) in enumerate(full.items()):
        shown = sorted(row["domains"], key=lambda item: -item["tokens"])[:_MOST_DOMAINS]
        data.append(
            {
                "type": "bar",
                "name": _called(lead),
                "x": [item["domain"] or "no label" for item in shown],
                "y": [item["recall"] for item in shown],
                "marker": {"color": _COLOURS[place % len(_COLOURS)]},
                "hovertemplate": "%{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
            }
        )
    return Chart(
        name="domain",
        title="Recall by domain",
        reading=f"The {_MOST_DOMAINS} largest at most; all are in the table.",
        figure=with_legend(data, layout("", "recall", height=420), a_line=2),
        columns=("lead", "domain", "recall", "tokens"),
        rows=[[str(lead), d["domain"], d["recall"], d["tokens"]] for lead, r in full.items() for d in r["domains"]],
        wide=True,
    )


def write_page(path: str | os.PathLike[str], rows: list[Row], *, name: str) -> None:
    """Write the page, whole or not at all.

    Parameters
    ----------
    path : path
        File to write.
    rows : list of dict
        Rows of ``swapless predict eval --json``.
    name : str
        What the trace is called.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    charts = charts_of(rows)
    full = [row for row in rows if row["moe_layer"] is None and "positions" in row]
    loader = PackageLoader("swapless.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1%}"
    figures = json.dumps([{"name": chart.name, **chart.figure} for chart in charts], allow_nan=False).replace("<", "\\u003c")
    template = environment.get_template("predict.html.j2")
    text = template.render(name=name, charts=charts, full=full, called=_called, figures=figures, plotly=get_plotlyjs())
    write_text(path, text)
