"""Sizes and shares as text: parsed only with an explicit unit, printed the same way everywhere.

``8GiB`` is 8 * 2**30 bytes and ``8GB`` is 8 * 10**9; a bare ``8G`` is refused, because the tools of this field disagree on
which of the two it means.
"""

from __future__ import annotations

import re

from swapless.errors import UnitError, message

_FACTORS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_MOST_BYTES = 2**63
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes of a size with its unit.

    Parameters
    ----------
    text : str or int
        ``"8GiB"``, ``"1.5 GB"``, ``"512 B"``; an int is taken as bytes.

    Returns
    -------
    int
        The size in bytes, at least 1.

    Raises
    ------
    UnitError
        No number, no unit, an ambiguous unit (``8G``) or a size below one byte.

    Examples
    --------
    >>> parse_size("8GiB"), parse_size("8GB")
    (8589934592, 8000000000)
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise UnitError(message("A size must be text with a unit, or bytes as an int.", got=repr(text)))
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text)
        if not match or match[2] not in _FACTORS:
            raise UnitError(
                message(
                    "A size needs a number and an explicit unit.",
                    got=repr(text),
                    allowed=", ".join(_FACTORS),
                    step="Write 8GiB for 8 * 2**30 bytes or 8GB for 8 * 10**9.",
                )
            )
        number = float(match[1]) * _FACTORS[match[2]]
        size = int(number) if number < _MOST_BYTES else _MOST_BYTES
    if size < 1:
        raise UnitError(message("A size must be at least one byte.", got=repr(text)))
    if size >= _MOST_BYTES:
        got = repr(text) if len(str(text)) < 40 else f"{str(text)[:20]}..."
        raise UnitError(message("No machine has so much memory.", got=got, allowed="below 8 * 2**60 bytes"))
    return size


def parse_share(text: str | float) -> float:
    """Fraction in (0, 1] from ``"25%"``, ``"0.25"`` or a float.

    Raises
    ------
    UnitError
        Not a number, or outside (0, 1].

    Examples
    --------
    >>> parse_share("25%"), parse_share(1.0)
    (0.25, 1.0)
    """
    try:
        share = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise UnitError(message("A resident share must lie in (0, 1].", got=repr(text), allowed="25% or 0.25"))
    return share


def format_size(size_bytes: float) -> str:
    """Human form in binary units.

    Examples
    --------
    >>> format_size(3 * 2**30), format_size(512)
    ('3.00 GiB', '512 B')
    """
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def format_rate(value: float) -> str:
    """A speed in three digits: more than that no two runs share.

    Examples
    --------
    >>> format_rate(352.704), format_rate(12.345), format_rate(0.2871), format_rate(12345.6)
    ('353', '12.3', '0.287', '12346')
    """
    rounded = abs(float(f"{value:.3g}"))
    digits = 0 if rounded >= 100 or not rounded else 1 if rounded >= 10 else 2 if rounded >= 1 else 3
    return f"{value:.{digits}f}"


def exact_size(size_bytes: int) -> str:
    """The same bytes as text that :func:`parse_size` takes, in the largest unit that says them exactly.

    Examples
    --------
    >>> exact_size(8 * 2**30), exact_size(1_200_000_000), exact_size(1001)
    ('8GiB', '1200MB', '1001B')
    """
    units = sorted(_FACTORS.items(), key=lambda item: -item[1])
    return next(f"{size_bytes // factor}{unit}" for unit, factor in units if size_bytes % factor == 0)
