"""transformers' own warnings, which quote what files hold: on their way to a terminal nothing in them is obeyed."""

from __future__ import annotations

import logging

import transformers  # noqa: F401 - its handler is there from now on

from swapless.errors import written_out


class _WrittenOut(logging.Filter):
    """Lets every record through, with control characters as escapes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Write out what the record says."""
        record.msg, record.args = written_out(record.getMessage()), None
        return True


def write_out_logs() -> None:
    """Put the filter on the handlers of transformers, once."""
    for handler in logging.getLogger("transformers").handlers:
        if not any(isinstance(known, _WrittenOut) for known in handler.filters):
            handler.addFilter(_WrittenOut())
