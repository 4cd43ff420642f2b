"""Files made wrong on purpose, and a child process in which a wrong file can do no harm.

:func:`json_mutations` and :func:`byte_mutations` give named variants of a good file, the same ones for the same seed.
:func:`bounded` runs a function on one of them in another process, within seconds and bytes, and says how it ended.

A suite for a format is then: for each variant, write it beside its good neighbours, call the reader through :func:`bounded`,
and hold ``outcome.kind`` against what is allowed: ``"typed"`` always, ``"value"`` where the value is the right one.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20.0
EXTRA_BYTES = 1 << 30

_PRELOADED = "tests.fuzz.warm"


class Mutation(NamedTuple):
    """A variant of a good file: what was done to it, and its bytes."""

    name: str
    raw: bytes


class Outcome(NamedTuple):
    """How a bounded call ended.

    ``kind`` is ``"value"``, ``"typed"`` (an error of our own tree), ``"foreign"`` (any other), ``"crash"`` (a signal),
    ``"slow"`` or ``"memory"``. ``detail`` says more in a line, and for foreign errors in a traceback; ``value`` is what the
    function returned.
    """

    kind: str
    detail: str
    value: Any = None
    seconds: float = 0.0
    extra_bytes: int = 0

    @property
    def held(self) -> bool:
        """Whether it ended as a wrong file may: with an error of our own tree, or with a value that is yet to be judged."""
        return self.kind in ("typed", "value")


WRONG_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "zero": 0,
    "one": 1,
    "a million": 10**6,
    "2^31": 2**31,
    "2^62": 2**62,
    "2^63-1": 2**63 - 1,
    "a fraction": 0.5,
    "a tiny number": 1e-300,
    "a word": "nonsense",
    "an empty text": "",
    "a digit as text": "3",
    "a path out": "../../../etc/passwd",
    "escapes": "\x1b[2J\x00\u202e",
    "a long text": "a" * 100_000,
    "an empty list": [],
    "a list": [1, -2, "x", None],
    "an empty object": {},
    "an object": {"nonsense": [None]},
}
"""What may stand in the place of any value of a JSON file."""

RAW_VALUES = {
    "infinity": "Infinity",
    "nan": "NaN",
    "beyond doubles": "1e999",
    "5000 digits": "9" * 5000,
    "nested 100000 deep": "[" * 100_000 + "]" * 100_000,
    "objects 5000 deep": '{"a":' * 5000 + "1" + "}" * 5000,
    "lone surrogate": '"\\ud800"',
}
"""Likewise, but text that Python's own writer does not make."""

_HOLE = "@@hole@@"


def paths(document: Any, most_per_list: int = 2) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document, the document itself first; of a list only the first items."""
    yield ()
    children: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        children = list(document.items())
    elif isinstance(document, list):
        children = list(enumerate(document[:most_per_list]))
    for key, value in children:
        for rest in paths(value, most_per_list):
            yield (key, *rest)


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``document`` with another value in one place."""
    if not path:
        return value
    copied = dict(document) if isinstance(document, dict) else list(document)
    copied[path[0]] = replaced(copied[path[0]], path[1:], value)
    return copied


def removed(document: Any, path: tuple[Any, ...]) -> Any:
    """A copy of ``document`` without what stands in one place, which is not the document itself."""
    copied = dict(document) if isinstance(document, dict) else list(document)
    if len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = removed(copied[path[0]], path[1:])
    return copied


def json_mutations(document: Any, count: int, seed: int = 0) -> list[Mutation]:
    """``count`` variants of a JSON document: wrong values in any place, keys gone, twice or unknown, texts that are no JSON.

    Every kind is met where ``count`` is 40 or more; which place it hits is drawn by ``seed``.
    """
    rng = random.Random(seed)
    places = list(paths(document))
    inner = [path for path in places if path]
    made: list[Mutation] = []
    text = json.dumps(document)
    kinds: list[Callable[[], Mutation]] = []

    def wrong(name: str, value: Any) -> Callable[[], Mutation]:
        def make() -> Mutation:
            path = rng.choice(places)
            return Mutation(f"{_shown(path)} is {name}", json.dumps(replaced(document, path, value)).encode())

        return make

    def raw(name: str, value: str) -> Callable[[], Mutation]:
        def make() -> Mutation:
            path = rng.choice(places)
            whole = json.dumps(replaced(document, path, _HOLE)).replace(json.dumps(_HOLE), value)
            return Mutation(f"{_shown(path)} is {name}", whole.encode())

        return make

    def gone() -> Mutation:
        path = rng.choice(inner)
        return Mutation(f"{_shown(path)} is gone", json.dumps(removed(document, path)).encode())

    def twice() -> Mutation:
        key = rng.choice([path[-1] for path in inner if isinstance(path[-1], str)] or [""])
        return Mutation(
            f"{key} stands twice", text.replace(f"{json.dumps(key)}:", f"{json.dumps(key)}: 0, {json.dumps(key)}:", 1).encode()
        )

    def unknown() -> Mutation:
        tables = [path for path in places if isinstance(_at(document, path), dict)] or [()]
        path = rng.choice(tables)
        value = _at(document, path)
        grown = value | {"unknown_key": 1} if isinstance(value, dict) else {"unknown_key": value}
        return Mutation(f"{_shown(path)} has an unknown key", json.dumps(replaced(document, path, grown)).encode())

    def off_by_one() -> Mutation:
        numbers = [path for path in inner if type(_at(document, path)) in (int, float)]
        if not numbers:
            return gone()
        path, step = rng.choice(numbers), rng.choice([-1, 1, 2, 7, -64])
        return Mutation(f"{_shown(path)} {step:+d}", json.dumps(replaced(document, path, _at(document, path) + step)).encode())

    kinds += [wrong(name, value) for name, value in WRONG_VALUES.items()]
    kinds += [raw(name, value) for name, value in RAW_VALUES.items()]
    kinds += [gone, gone, gone, gone, twice, unknown, off_by_one, off_by_one, off_by_one]
    kinds += [lambda change=change, name=name: Mutation(name, change(text.encode())) for name, change in TEXT_CHANGES.items()]
    while len(made) < count:
        rng.shuffle(kinds)
        made += [kind() for kind in kinds[: count - len(made)]]
    return made


TEXT_CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "followed by garbage": lambda raw: raw + b"\x00garbage",
    "no text": lambda raw: b"\xff\xfe\x00\x80" + raw,
    "byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "zeros": lambda raw: bytes(len(raw)),
    "a list around it": lambda raw: b"[" + raw + b"]",
    "single quotes": lambda raw: raw.replace(b'"', b"'"),
    "nested 100000 deep, open": lambda raw: b"[" * 100_000,
}
"""What may be done to the text of a JSON file as a whole."""


def byte_mutations(raw: bytes, count: int, seed: int = 0, first: int = 0, last: int | None = None) -> list[Mutation]:
    """``count`` variants of a binary file, changed between the bytes ``first`` and ``last`` (cuts and growth: anywhere)."""
    rng = random.Random(seed)
    end = len(raw) if last is None else min(last, len(raw))
    made: list[Mutation] = []
    if not raw:
        return made

    def place(width: int = 1) -> int:
        return rng.randrange(first, max(first + 1, end - width + 1))

    def flip() -> Mutation:
        at, bit = place(), rng.randrange(8)
        return Mutation(f"bit {bit} of byte {at} flipped", raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])

    def integer() -> Mutation:
        at, value = place(8), rng.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1])
        return Mutation(f"bytes {at} to {at + 8} are {value:#x}", raw[:at] + struct.pack("<Q", value) + raw[at + 8 :])

    def cut() -> Mutation:
        at = rng.randrange(len(raw))
        return Mutation(f"cut to {at} bytes", raw[:at])

    def dropped() -> Mutation:
        at, width = place(), rng.choice([1, 3, 8, 64])
        return Mutation(f"{width} bytes gone at {at}", raw[:at] + raw[at + width :])

    def inserted() -> Mutation:
        at, width = place(), rng.choice([1, 3, 8, 64])
        return Mutation(f"{width} bytes more at {at}", raw[:at] + rng.randbytes(width) + raw[at:])

    def zeroed() -> Mutation:
        at, width = place(), rng.choice([4, 16, 256])
        return Mutation(f"{width} bytes zeroed at {at}", raw[:at] + bytes(min(width, len(raw) - at)) + raw[at + width :])

    def swapped() -> Mutation:
        width = min(64, max(1, (end - first) // 4))
        a, b = sorted((place(width), place(width)))
        if b < a + width:
            return flip()
        parts = raw[:a], raw[b : b + width], raw[a + width : b], raw[a : a + width], raw[b + width :]
        return Mutation(f"{width} bytes at {a} and {b} exchanged", b"".join(parts))

    def grown() -> Mutation:
        return Mutation("followed by 4096 bytes", raw + rng.randbytes(4096))

    kinds = [flip, flip, flip, integer, integer, cut, cut, dropped, inserted, zeroed, swapped, grown]
    while len(made) < count:
        rng.shuffle(kinds)
        made += [kind() for kind in kinds[: count - len(made)]]
    return made


class Worker:
    """A process that calls functions one after another, and is begun anew once one of them crashed, hung or kept memory.

    It is forked from a server that has imported torch, transformers and ourselves. ``last`` names what it was given, for an
    end that an earlier call brought about.
    """

    def __init__(self) -> None:
        self.last: list[str] = []
        self._process: Any = None
        self._pipe: Any = None

    def call(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float, extra_bytes: int, typed: Any
    ) -> Outcome:
        """As :func:`bounded`."""
        if self._process is None:
            self._begin()
        self.last = [*self.last[-4:], f"{function.__name__}{tuple(str(value)[-60:] for value in arguments)}"]
        began = time.monotonic()
        try:
            self._pipe.send((function, arguments, extra_bytes, typed))
            outcome, again = self._pipe.recv() if self._pipe.poll(seconds) else (Outcome("slow", f"over {seconds:g} s"), True)
        except (EOFError, ConnectionError):
            self._process.join(5)
            words = Path(self._words.name).read_text(errors="replace")[-2000:]
            outcome, again = Outcome("crash", f"exit code {self._process.exitcode} after {self.last}: {words}"), True
        if again:
            self.end()
        return outcome._replace(seconds=time.monotonic() - began)

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._words.close()
        self._process, self.last = None, []

    def _begin(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_PRELOADED, __name__])
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # the other ones reserve more than a call may take
        self._words = tempfile.NamedTemporaryFile()  # noqa: SIM115 - open as long as the process
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._words.name), daemon=True)
        self._process.start()
        other.close()


_WORKER = Worker()
atexit.register(_WORKER.end)


def bounded(
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = SECONDS,
    extra_bytes: int = EXTRA_BYTES,
    typed: tuple[type[BaseException], ...] | None = None,
) -> Outcome:
    """Call ``function`` in another process and say how it ended; ``extra_bytes`` is what it may take beyond what was there.

    The process is shared by calls that follow each other, so that one costs a millisecond; see :class:`Worker`.

    Parameters
    ----------
    function : callable
        Of a module that can be imported (no lambda, no inner function); its result must be picklable.
    typed : tuple of exception types
        What counts as an error of our own; by default the whole tree of :mod:`swapless.errors`.
    """
    return _WORKER.call(function, arguments, seconds, extra_bytes, typed)


_KEPT_BYTES = 256 << 20


def _serve(pipe: Any, words: str) -> None:
    descriptor = os.open(words, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable(file=descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = _data_bytes()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            os._exit(0)
        os.truncate(words, 0)
        outcome = _outcome(*task)
        kept = _data_bytes() - first
        again = outcome.kind == "memory" or kept > _KEPT_BYTES
        try:
            pipe.send((outcome, again))
        except Exception as error:
            pipe.send((Outcome("foreign", f"the result cannot be sent: {error}"), again))


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...], extra_bytes: int, typed: Any) -> Outcome:
    from swapless.errors import SwaplessError

    own = typed or (SwaplessError,)
    before = _data_bytes()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before + extra_bytes, most))
    try:
        outcome = Outcome("value", "", function(*arguments))
    except own as error:
        outcome = Outcome("typed", f"{type(error).__name__}: {error}")
    except MemoryError:
        outcome = Outcome("memory", traceback.format_exc()[-2000:])
    except BaseException as error:
        kind = "memory" if "alloc" in str(error).lower() else "foreign"
        outcome = Outcome(kind, traceback.format_exc()[-2000:])
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return outcome._replace(extra_bytes=max(0, _data_bytes() - before))


def _data_bytes() -> int:
    """Private writable memory of this process, which is what the limit counts."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _shown(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "the whole"
