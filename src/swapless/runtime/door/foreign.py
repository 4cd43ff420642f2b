"""Errors of transformers, tokenizers, torch and jinja become ours where they arise, with the file that brought them about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from swapless.errors import CheckpointCorruptError, SwaplessError, message
from swapless.untrusted import shown


@contextmanager
def foreign_errors(
    what: str, where: object, *, error: type[SwaplessError] = CheckpointCorruptError, step: str | None = None
) -> Iterator[None]:
    """Turn whatever another library raises within into ``error``: what it was about, its file, and the library's own words.

    Libraries check what they are given each in their own way, and a wrong value of a file may end in any exception there is.
    One of ours, an interrupt or the end of the process goes through as it is.
    """
    try:
        yield
    except SwaplessError:
        raise
    except BaseException as fault:
        # A panic of a library in Rust is no Exception.
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        raise error(message(what, where=where, got=words_of(fault), step=step)) from fault


def words_of(fault: BaseException, most: int = 240) -> str:
    """An error's words and type on one line, without control characters and cut where they are long."""
    words = " ".join(str(fault).split())
    words = "".join(letter if letter.isprintable() else shown(letter)[1:-1] for letter in words)
    words = words[:most].rstrip(".: ")
    return f"{words} ({type(fault).__name__})" if words else type(fault).__name__
