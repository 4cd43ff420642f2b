"""The locality page: one file with charts, tables and Plotly itself inside, which needs no network."""

from __future__ import annotations

import json
import os
from itertools import groupby
from typing import Any

from swapless.atomic import write_text
from swapless.report import figures, maps
from swapless.report.figures import Chart
from swapless.report.results import Result, results_of


def charts_of(results: list[Result]) -> list[Chart]:
    """All charts in their order on the page."""
    charts: list[Chart | None] = [
        figures.capacity_chart(results),
        figures.srp_chart(results),
        figures.sch_chart(results),
        figures.reuse_chart(results),
        figures.balance_chart(results),
    ]
    for number, result in enumerate(results):
        charts += [maps.layer_chart(result, number), maps.load_chart(result, number), maps.domain_chart(result, number)]
    return [chart for chart in charts if chart is not None]


def page(documents: list[dict[str, Any]]) -> str:
    """The page as text.

    Parameters
    ----------
    documents : list of dict
        Result documents of ``swapless locality --json``, one a trace.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    results = results_of(documents)
    charts = charts_of(results)
    environment = Environment(
        loader=PackageLoader("swapless.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1%}"
    template = environment.get_template("page.html.j2")
    groups = [(name, list(members)) for name, members in groupby(charts, key=lambda chart: chart.group)]
    data = [{"name": chart.name, **chart.figure} for chart in charts]
    return template.render(results=results, groups=groups, facts=_facts, data=_script(data), plotly=get_plotlyjs())


def write_page(path: str | os.PathLike[str], documents: list[dict[str, Any]]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, page(documents))


def _script(value: Any) -> str:
    """JSON that may stand inside a script element, whatever the labels hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(result: Result) -> list[tuple[str, str, str]]:
    """Figures at the top: name, value, and what to compare it with."""
    segment = result.shown_segment
    srp = result.rows("srp", "model", segment_tokens=segment)[0]
    overlap = result.rows("overlap", "model")[0]
    verdict = result.verdict
    shown = [
        (f"SRP, {segment} tokens", srp["value"], f"random {srp['chance']:.1%}"),
        (f"LRU, {verdict['capacity_experts']} of {result.experts}", verdict["hit_rate"], f"random {verdict['chance']:.1%}"),
        (f"Belady, {verdict['capacity_experts']} of {result.experts}", verdict["clairvoyant"], "the optimum"),
        ("shared with the token before", overlap["value"], f"random {overlap['chance']:.1%}"),
    ]
    facts = [(name, "-" if value is None else f"{value:.1%}", beside) for name, value, beside in shown]
    knee = (f"{verdict['knee_experts']} of {result.experts}", f"LRU {verdict['knee_hit_rate']:.1%}")
    return [*facts, ("knee, experts a MoE layer", *knee)]
