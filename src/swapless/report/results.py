"""One result document of ``swapless locality``, ready to be asked for rows."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


class Result:
    """Rows of one trace, found by measure.

    Parameters
    ----------
    document : dict
        What ``swapless locality --json`` prints for one trace.
    name : str
        How the page calls it.
    colour : str
        Its colour in every chart that compares traces.
    """

    def __init__(self, document: dict[str, Any], name: str, colour: str) -> None:
        self.document, self.name, self.colour = document, name, colour
        self.header, self.settings = document["header"], document["settings"]
        self.verdict, self.about = document["verdict"], document["trace"]
        self._by_measure: dict[tuple[str, str], list[Row]] = {}
        empty = {r["segment_tokens"] for r in document["rows"] if r["measure"] == "working_set" and r["value"] is None}
        nothing = {"value": None, "ci_low": None, "ci_high": None}
        for row in document["rows"]:
            # SRP is 0 by definition where every document is shorter than the segment; a chart shows nothing there.
            shown = row | nothing if row["measure"].startswith("srp") and row["segment_tokens"] in empty else row
            self._by_measure.setdefault((row["measure"], row["level"]), []).append(shown)
        self._segments = [m for m in self.settings["segments"] if m not in empty] or self.settings["segments"]

    @property
    def experts(self) -> int:
        """E, routed experts a MoE layer."""
        return int(self.header["num_experts"])

    @property
    def top_k(self) -> int:
        """K, experts a token."""
        return int(self.header["top_k"])

    @property
    def layers(self) -> int:
        """L, MoE layers."""
        return len(self.header["moe_blocks"])

    @property
    def shown_segment(self) -> int:
        """The segment length that single-length charts show: the one nearest to 16 tokens that some document has."""
        return int(min(self._segments, key=lambda m: (abs(m - 16), m)))

    def rows(self, measure: str, level: str, **wanted: Any) -> list[Row]:
        """Rows of a measure and level whose fields are as ``wanted``; ``domain`` is null unless asked for."""
        wanted = {"domain": None, **wanted}
        return [
            row
            for row in self._by_measure.get((measure, level), [])
            if all(row[name] == value for name, value in wanted.items() if value != "any")
        ]


COLOURS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#0891b2", "#65a30d", "#7c3aed")


def results_of(documents: list[dict[str, Any]]) -> list[Result]:
    """Results with distinct names and colours: the model's id, with the file's name where ids repeat or are missing."""
    ids = [document["header"].get("model_id") for document in documents]
    named = []
    for number, (document, model_id) in enumerate(zip(documents, ids)):
        file = document["trace"].get("file") or f"trace {number + 1}"
        short = (model_id or file).split("/")[-1]
        name = f"{short} ({file})" if model_id and ids.count(model_id) > 1 else short
        named.append(Result(document, name, COLOURS[number % len(COLOURS)]))
    return named
