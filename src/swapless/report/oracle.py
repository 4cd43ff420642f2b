"""The page of ``swapless oracle compare``: the table of twins, and which expert each token used, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from swapless.atomic import write_text

__all__ = ["write_page"]


def runs_of(experts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Stretches of one expert: (first token, tokens, expert).

    Examples
    --------
    >>> runs_of([3, 3, 5, 3])
    [(0, 2, 3), (2, 1, 5), (3, 1, 3)]
    """
    found: list[tuple[int, int, int]] = []
    for place, expert in enumerate(experts):
        if found and found[-1][2] == expert:
            first, tokens, _ = found.pop()
            found.append((first, tokens + 1, expert))
        else:
            found.append((place, 1, expert))
    return found


def colour(expert: int, experts: int) -> str:
    """A colour of its own for each expert: hues evenly spread, light and dark in turn."""
    return f"hsl({360 * expert / experts:.0f} 70% {42 if expert % 2 else 62}%)"


def strip_of(result: dict[str, Any]) -> dict[str, Any] | None:
    """What the template draws of one result; None for a dense model."""
    strip = result["figures"].get("strip")
    if strip is None:
        return None
    rows = [
        {
            "block": block,
            "runs": runs_of(experts),
            "changes": len(runs_of(experts)) - 1,
        }
        for block, experts in zip(strip["blocks"], strip["experts"], strict=True)
    ]
    colours = [colour(expert, strip["num_experts"]) for expert in range(strip["num_experts"])]
    tokens = len(strip["experts"][0])
    return {"name": result["name"], "rows": rows, "tokens": tokens, "colours": colours, **strip}


def write_page(
    path: str | os.PathLike[str], results: list[dict[str, Any]], rows: list[dict[str, Any]], kept: dict[str, float]
) -> None:
    """Write the page, whole or not at all; it needs no script and no network.

    Parameters
    ----------
    path : path
        File to write.
    results : list of dict
        Results of the runs.
    rows : list of dict
        Rows of ``swapless oracle compare --json``.
    kept : dict
        Share of the learned gate's gain that each row keeps.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("swapless.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    strips = [strip for strip in map(strip_of, results) if strip is not None]
    text = environment.get_template("oracle.html.j2").render(rows=rows, kept=kept, strips=strips)
    write_text(path, text)
