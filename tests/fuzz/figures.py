"""What the fuzz suites count: formats by outcome, with the longest call and the most memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from tests.fuzz.mutations import Outcome

_COUNTS: defaultdict[str, Counter[str]] = defaultdict(Counter)
_SECONDS: defaultdict[str, float] = defaultdict(float)


def count(form: str, ended: str, outcome: Outcome) -> None:
    """Add a file of a format that ended so."""
    _COUNTS[form][ended] += 1
    _SECONDS[form] = max(_SECONDS[form], outcome.seconds)


def lines() -> Iterator[str]:
    """The table, a line a format."""
    for form, found in sorted(_COUNTS.items()):
        ended = ", ".join(f"{number} {name}" for name, number in found.most_common())
        yield f"{form}: {found.total()} files, {ended}; the longest {_SECONDS[form]:.1f} s"
