"""Runs of a long benchmark, kept as soon as each is done, so that its rounds may be spread over several short calls.

    kept = Kept(folder / "runs.jsonl", stop_after_s=240)
    while kept.time_left() and (todo := missing(kept.runs)): kept.add(run(todo[0]))

A machine that is silent for five minutes at a time cannot hold a benchmark of an hour, and a call that is cut off must not cost
what was measured before. A line of the file is a run, with the commit that made it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from results import commit


class Kept:
    """Runs so far, those of earlier calls included.

    Parameters
    ----------
    path : Path
        The file, made with the first run.
    stop_after_s : float, optional
        After so many seconds no further run should begin.
    """

    def __init__(self, path: Path, stop_after_s: float | None = None) -> None:
        self._path = path
        self._ends = time.monotonic() + stop_after_s if stop_after_s else None
        self.commit = commit()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def time_left(self) -> bool:
        """Whether another run may begin."""
        return self._ends is None or time.monotonic() < self._ends

    def add(self, run: dict[str, Any]) -> None:
        """Keep one more, with the commit of the checkout."""
        run = run | {"commit": self.commit}
        self.runs.append(run)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
