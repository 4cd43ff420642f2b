"""What the library says aside, on the command line's own standard error: one line each."""

from __future__ import annotations

import logging
from collections.abc import Callable


class _Notices(logging.Handler):
    """Warnings in any case; what is only good to know as a note, which ``--quiet`` drops."""

    def __init__(self, note: Callable[[str], None], warn: Callable[[str], None]) -> None:
        super().__init__()
        self._note, self._warn = note, warn

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        say = self._warn if record.levelno >= logging.WARNING else self._note
        say(record.getMessage())


def hear(note: Callable[[str], None], warn: Callable[[str], None], quiet: bool) -> None:
    """Pass what ``swapless`` logs on to ``note`` and ``warn``, instead of to the sink of an earlier verb of this process."""
    logger = logging.getLogger("swapless")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    for handler in list(logger.handlers):
        if isinstance(handler, _Notices):
            logger.removeHandler(handler)
    logger.addHandler(_Notices(note, warn))
