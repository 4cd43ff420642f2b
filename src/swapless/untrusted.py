"""The one door for JSON that others wrote: bounded before it is parsed, and typed when it is asked.

A configuration, an index, a manifest or a header comes from somebody's disk or from the network. :func:`parse_json` bounds
its size, its depth and its numbers and refuses duplicate keys. :class:`Table` then gives each value with the type and the range
that the reader needs, or an error that says file, key, got and allowed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from swapless.errors import CheckpointCorruptError, SwaplessError, message

MAX_BYTES = 100 * 2**20
"""The largest document that is read. The index of a checkpoint of 200,000 tensors has about 20 MB."""
MAX_DEPTH = 64
"""The deepest nesting that is parsed; published configurations have fewer than ten levels."""
MAX_INTEGER = 2**63 - 1
_SHOWN_CHARACTERS = 60
_MISSING: Any = object()


class _Refusal(Exception):
    """Why a document is refused, on its way out of the JSON parser."""


def read_regular(path: str | os.PathLike[str], *, error: type[SwaplessError], what: str, max_bytes: int = MAX_BYTES) -> bytes:
    """All bytes of a regular file of at most ``max_bytes``.

    A pipe, a device or a socket is refused before it is opened for reading: reading one may never end.

    Raises
    ------
    error
        The file is no regular file or too large.
    OSError
        There is no such file, or it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(message(f"The {what} is not a regular file.", where=path))
        if status.st_size > max_bytes:
            too_large = f"The {what} is too large."
            raise error(message(too_large, where=path, got=f"{status.st_size} bytes", allowed=f"up to {max_bytes}"))
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise error(message(f"The {what} is too large.", where=path, allowed=f"up to {max_bytes} bytes"))
    return raw


def parse_json(
    raw: bytes | str,
    *,
    where: object,
    error: type[SwaplessError] = CheckpointCorruptError,
    what: str = "document",
    special_floats: bool = False,
) -> Any:
    """The value of a JSON text.

    Parameters
    ----------
    raw : bytes or str
        The text; bytes are UTF-8.
    where : object
        The file (or address) that messages name.
    error : type
        What is raised.
    what : str
        What the document is, as messages say it.
    special_floats : bool
        Whether ``NaN`` and ``Infinity`` are let through, which JSON does not have and Python's own writer makes. Some
        published configurations hold ``Infinity``.

    Raises
    ------
    error
        No JSON, nested more than 64 deep, a key twice in one object, an integer outside 64 bits, a number that is not finite.

    Examples
    --------
    >>> parse_json('{"a": [1, 2]}', where="x.json")
    {'a': [1, 2]}
    """

    def refuse(why: str, got: object = None) -> NoReturn:
        raise error(message(f"The {what} cannot be read: {why}.", where=where, got=None if got is None else shown(got)))

    if len(raw) > MAX_BYTES:
        refuse(f"it has more than {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as fault:
        refuse(f"it is not UTF-8 at byte {fault.start}")
    _check_depth(text, refuse)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float_of(special_floats),
            parse_constant=_constant_of(special_floats),
        )
    except _Refusal as fault:
        refuse(str(fault))
    except (json.JSONDecodeError, RecursionError, ValueError) as fault:
        refuse("it is no JSON", fault)


def read_json(
    path: str | os.PathLike[str],
    *,
    error: type[SwaplessError] = CheckpointCorruptError,
    what: str = "document",
    max_bytes: int = MAX_BYTES,
    special_floats: bool = False,
) -> Table:
    """The JSON object in a file.

    Raises
    ------
    error
        No regular file, too large, no JSON object.
    OSError
        There is no such file, or it cannot be read.
    """
    raw = read_regular(path, error=error, what=what, max_bytes=max_bytes)
    value = parse_json(raw, where=path, error=error, what=what, special_floats=special_floats)
    return Table(value, where=path, error=error)


def shown(value: object) -> str:
    """``value`` as a message shows it: on one line, without control characters, and cut where it is long.

    Examples
    --------
    >>> shown("a" * 80)[-4:], shown(chr(27) + "[31m")
    ("aaa'", "'\\\\x1b[31m'")
    """
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    if len(text) > _SHOWN_CHARACTERS:
        half = _SHOWN_CHARACTERS // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text


class Table:
    """A JSON object that is asked for one key at a time, each with its type and range.

    Parameters
    ----------
    value : dict
        The parsed object.
    where : object
        The file that messages name.
    error : type
        What is raised.
    key : str
        Where in the file the object stands, such as ``moe_layers[3].pieces[0]``; empty at the top.

    Raises
    ------
    error
        ``value`` is no object.

    Examples
    --------
    >>> table = Table({"bits": 4, "layers": [{"block": 0}]}, where="manifest.json")
    >>> table.integer("bits", minimum=4, maximum=16)
    4
    >>> [layer.integer("block") for layer in table.tables("layers")]
    [0]
    """

    def __init__(
        self, value: Any, *, where: object, error: type[SwaplessError] = CheckpointCorruptError, key: str = ""
    ) -> None:
        self.where = where
        self.error = error
        self.key = key
        if not isinstance(value, dict):
            self._refuse(key, value, "an object")
        self._value: dict[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    @property
    def value(self) -> dict[str, Any]:
        """The plain object, for what is kept without being looked at."""
        return self._value

    def only(self, *known: str) -> None:
        """Refuse keys that are not ``known``."""
        unknown = [key for key in self._value if key not in known]
        if unknown:
            self._refuse(self.key, unknown[0], f"the keys {', '.join(known)}", what="An unknown key")

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        """The value of ``key`` as it stands."""
        if key not in self._value:
            if default is _MISSING:
                self._refuse(self._path(key), _MISSING, "a value")
            return default
        return self._value[key]

    def integer(self, key: str, *, minimum: int = 0, maximum: int = MAX_INTEGER, default: Any = _MISSING) -> int:
        """A whole number from ``minimum`` to ``maximum``."""
        value = self.raw(key, default)
        if value is default and key not in self._value:
            return default
        if type(value) is not int or not minimum <= value <= maximum:
            allowed = f"a whole number from {minimum}" + (f" to {maximum}" if maximum < MAX_INTEGER else "")
            self._refuse(self._path(key), value, allowed)
        return value

    def number(self, key: str, *, minimum: float = -math.inf, maximum: float = math.inf, default: Any = _MISSING) -> float:
        """A finite number from ``minimum`` to ``maximum``."""
        value = self.raw(key, default)
        if value is default and key not in self._value:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not minimum <= value <= maximum:
            self._refuse(self._path(key), value, f"a finite number from {minimum} to {maximum}")
        return float(value)

    def flag(self, key: str, *, default: Any = _MISSING) -> bool:
        """``true`` or ``false``."""
        value = self.raw(key, default)
        if value is default and key not in self._value:
            return default
        if type(value) is not bool:
            self._refuse(self._path(key), value, "true or false")
        return value

    def text(
        self,
        key: str,
        *,
        choices: Sequence[str] = (),
        pattern: str | None = None,
        maximum: int = 10_000,
        default: Any = _MISSING,
    ) -> str:
        """A text of at most ``maximum`` characters, one of ``choices`` or matching ``pattern`` where they are given."""
        value = self.raw(key, default)
        if value is default and key not in self._value:
            return default
        if not isinstance(value, str) or len(value) > maximum:
            self._refuse(self._path(key), value, f"a text of at most {maximum} characters")
        if choices and value not in choices:
            self._refuse(self._path(key), value, ", ".join(choices))
        if pattern is not None and not re.fullmatch(pattern, value):
            self._refuse(self._path(key), value, f"a text like {pattern}")
        return value

    def table(self, key: str, *, default: Any = _MISSING) -> Table:
        """An object."""
        value = self.raw(key, default)
        return Table(value, where=self.where, error=self.error, key=self._path(key))

    def items(self, key: str, *, minimum: int = 0, maximum: int = 1_000_000, default: Any = _MISSING) -> list[Any]:
        """A list of ``minimum`` to ``maximum`` values."""
        value = self.raw(key, default)
        if not isinstance(value, list) or not minimum <= len(value) <= maximum:
            self._refuse(self._path(key), value, f"a list of {minimum} to {maximum} values")
        return value

    def tables(self, key: str, *, minimum: int = 0, maximum: int = 1_000_000) -> list[Table]:
        """A list of objects."""
        values = self.items(key, minimum=minimum, maximum=maximum)
        return [
            Table(value, where=self.where, error=self.error, key=f"{self._path(key)}[{at}]") for at, value in enumerate(values)
        ]

    def integers(
        self, key: str, *, minimum: int = 0, maximum: int = MAX_INTEGER, least: int = 0, most: int = 1_000_000
    ) -> list[int]:
        """A list of ``least`` to ``most`` whole numbers from ``minimum`` to ``maximum``."""
        values = self.items(key, minimum=least, maximum=most)
        for at, value in enumerate(values):
            if type(value) is not int or not minimum <= value <= maximum:
                self._refuse(f"{self._path(key)}[{at}]", value, f"a whole number from {minimum} to {maximum}")
        return values

    def texts(self, key: str, *, least: int = 0, most: int = 1_000_000, maximum: int = 10_000) -> list[str]:
        """A list of ``least`` to ``most`` texts of at most ``maximum`` characters."""
        values = self.items(key, minimum=least, maximum=most)
        for at, value in enumerate(values):
            if not isinstance(value, str) or len(value) > maximum:
                self._refuse(f"{self._path(key)}[{at}]", value, f"a text of at most {maximum} characters")
        return values

    def refuse(self, key: str, allowed: str) -> NoReturn:
        """Raise the error for the value of ``key``, which the reader found impossible."""
        self._refuse(self._path(key), self._value.get(key, _MISSING), allowed)

    def _path(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key else key

    def _refuse(self, path: str, value: Any, allowed: str, what: str = "A value") -> NoReturn:
        name = f"{what} in the file is wrong" if not path else f"{what} in the file is wrong: {shown(path)[1:-1]}"
        got = "nothing" if value is _MISSING else shown(value)
        raise self.error(message(f"{name}.", where=Path(str(self.where)), got=got, allowed=allowed))


_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)
"""A text as a whole (an open one to the end of the file, or it would be tried again from each later quote), or a bracket."""


def _check_depth(text: str, refuse: Any) -> None:
    """Refuse deep nesting before the parser recurses into it."""
    depth = 0
    for token in _BRACKETS.finditer(text):
        letter = token[0]
        if letter in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                refuse(f"it is nested more than {MAX_DEPTH} deep")
        elif letter in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refusal(f"the key {shown(twice)} stands twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise _Refusal(f"the integer {shown(digits)[1:-1]} has more than 64 bits")
    return value


def _float_of(special: bool) -> Any:
    def parse(digits: str) -> float:
        value = float(digits)
        if not special and not math.isfinite(value):
            raise _Refusal(f"the number {shown(digits)[1:-1]} is not finite")
        return value

    return parse


def _constant_of(special: bool) -> Any:
    def parse(name: str) -> float:
        if not special:
            raise _Refusal(f"{name} is no number of JSON")
        return float(name.replace("Infinity", "inf"))

    return parse
