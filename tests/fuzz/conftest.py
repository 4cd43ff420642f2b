"""Figures of the fuzz suites: how many files of each format ended how."""

from __future__ import annotations

from typing import Any

from tests.fuzz.figures import lines

collect_ignore = ["warm.py"]  # importing it compiles kernels


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in lines():
        terminalreporter.write_line(line)
