"""What machine code was made of: the key under which it is kept, so that code of other sources is never run.

A key has two halves that know nothing of each other. :func:`digest` reads the source files of the package, the versions of
what compiles them and its settings. :class:`Parts` looks at the functions themselves, as they are in memory, with all that
they reach: their bytecode, the constants that were frozen into it, the rules registered for a state. So neither times of
files nor stale bytecode, neither an upgrade while a process runs nor a constant set from outside can make a key lie.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import numpy as np

PACKAGE = __name__.partition(".")[0]
LIBRARIES = frozenset({"numpy", "numba", "llvmlite", "torch", "builtins", *sys.stdlib_module_names}) - {"__main__"}
"""What is not looked into: a key holds the versions of those of them that compiled code can use."""
_NOT_COMPILED = {"cli", "report"}
"""Packages at the top of the house, which nothing imports: no compiled function can reach them."""
_SETTINGS = (
    "BOUNDSCHECK", "CPU_FEATURES", "CPU_NAME", "DEBUGINFO_DEFAULT", "ENABLE_AVX", "ENABLE_PROFILING", "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE",
)  # fmt: skip


def source_files(package: Path) -> Iterator[tuple[str, Path]]:
    """Name and place of every source that may take part in compiled code, in a fixed order."""
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if name.partition("/")[0] not in _NOT_COMPILED:
            yield name, file


@cache
def digest() -> str | None:
    """Digest of this package's sources as :func:`sources_digest` makes it, taken once."""
    return sources_digest(Path(__file__).parent)


def sources_digest(package: Path) -> str | None:
    """Digest of all sources, of the versions of what compiles them and of its settings; None without source files."""
    import llvmlite
    import numba
    from numba.core import config

    found = hashlib.sha256()
    seen = False
    for name, file in source_files(package):
        content = file.read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
        seen = True
    versions = (sys.version, sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, np.__version__)
    settings = [(name, getattr(config, name, None)) for name in _SETTINGS]
    found.update(repr((versions, settings)).encode())
    return found.hexdigest()[:24] if seen else None


_PARTS: dict[int, list[Callable[..., Any]]] = {}
_KEPT: list[object] = []  # ids are those of objects that live


def part_of(whole: object, part: Callable[..., Any]) -> None:
    """Say that whoever reaches ``whole``, a function or a type of state, compiles ``part`` as well."""
    if id(whole) not in _PARTS:
        _KEPT.append(whole)
    _PARTS.setdefault(id(whole), []).append(part)


class Unknown(Exception):
    """Something from outside the package that cannot be told apart from others of its kind."""


class Parts:
    """All that a compiled function and the types of its arguments reach.

    Parameters
    ----------
    function : callable
        The function, as Python has it.
    kinds : sequence
        Numba's types of its arguments.

    Raises
    ------
    Unknown
        A part from outside the package, a plug-in, cannot be named so that another process finds the same.
    """

    def __init__(self, function: Callable[..., Any], kinds: Any) -> None:
        self.from_outside = False
        self._outside_now = False
        self._hash = hashlib.sha256()
        self._queue: list[object] = [function]
        self._met = {id(function)}
        self._alive: list[object] = []
        self._sources: set[str] = set()
        for kind in kinds:
            self._say("argument", self._kind(kind))
        while self._queue:
            self._take(self._queue.pop(0))
        for file in sorted(self._sources):
            self._say("file", hashlib.sha256(Path(file).read_bytes()).hexdigest())

    def hexdigest(self) -> str:
        """Digest of all of them."""
        return self._hash.hexdigest()

    def _say(self, *words: object) -> None:
        self._hash.update(repr(words).encode() + b"\n")

    def _reach(self, item: Any) -> None:
        """Look at ``item`` too, once."""
        if id(item) not in self._met:
            self._met.add(id(item))
            self._alive.append(item)
            self._queue.append(item)

    def _kind(self, kind: Any) -> Any:
        """A numba type by what it is made of."""
        if isinstance(kind, (str, int, float, complex, bytes, type(None), Enum)):
            return repr(kind)
        if isinstance(kind, tuple):
            return tuple(self._kind(part) for part in kind)
        if isinstance(kind, type):
            return self._name(kind)
        made_of = getattr(kind, "key", kind)
        if made_of is kind:
            raise Unknown(f"the type {kind!r}")
        return type(kind).__name__, self._kind(getattr(kind, "value", None)), self._kind(made_of)

    def _name(self, item: Any) -> str:
        """A function or class by name; one from outside must be what its name stands for in any process."""
        module = str(getattr(item, "__module__", None) or "builtins")
        name = str(getattr(item, "__qualname__", None) or getattr(item, "__name__", ""))
        if _top(item) in LIBRARIES:
            return f"{module}.{name}"
        if isinstance(item, type) and _named(module, name) is not item:
            raise Unknown(f"{module}.{name}, which no import finds again")
        if _top(item) != PACKAGE:
            self.from_outside = True
            file = getattr(sys.modules.get(module), "__file__", None)
            if file is not None and file.endswith(".py") and os.path.isfile(file):  # noqa: PTH113
                self._sources.add(file)
        self._reach(item)
        return f"{module}.{name}"

    def _take(self, item: Any) -> None:
        self._outside_now = _top(item) != PACKAGE
        for part in _PARTS.get(id(item), ()):
            self._say("part", self._name(part))
        function = getattr(item, "py_func", item)
        if function is not item:
            self._say("options", options_text(item.targetoptions))
        function = getattr(function, "_defn", function)  # what an intrinsic runs
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, FunctionType):
            self._function(function)
        elif isinstance(function, type):
            self._say("class", getattr(function, "_fields", ()))
            for name, value in sorted(vars(function).items()):
                inner = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(inner, (FunctionType, *_VALUES)) and not name.startswith("__"):
                    self._say(name, self._value(inner))

    def _function(self, function: FunctionType) -> None:
        self._say("function", _code(function.__code__))
        self._say(self._value(function.__defaults__), self._value(function.__kwdefaults__))
        for cell in function.__closure__ or ():
            self._say("closed over", self._value(cell.cell_contents))
        names = _names(function.__code__)
        for name in names:
            if name in function.__globals__:
                value = function.__globals__[name]
                self._say(name, self._value(value))
                if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in LIBRARIES:
                    for attribute in names:
                        if attribute in vars(value):
                            self._say(attribute, self._value(vars(value)[attribute]))

    def _value(self, value: Any) -> Any:
        """A constant by its content, anything that has a name by that."""
        if isinstance(value, _VALUES):
            return repr(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        if isinstance(value, (tuple, list)):
            return type(value).__name__, [self._value(part) for part in value]
        if isinstance(value, (set, frozenset)):
            return type(value).__name__, sorted(repr(self._value(part)) for part in value)
        if isinstance(value, dict):
            return [(self._value(key), self._value(part)) for key, part in value.items()]
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodDescriptorType, np.ufunc)) or _compiles(value):
            return self._name(value)
        kind = type(value)
        if kind.__module__.startswith("numba.core.types"):
            return repr(value)
        if self._outside_now and _top(kind) not in LIBRARIES | {PACKAGE}:
            raise Unknown(f"a constant of {kind.__module__}.{kind.__qualname__}")
        return f"some {kind.__module__}.{kind.__qualname__}"  # of ours: the digest of the sources tells


_VALUES = (str, bytes, bool, int, float, complex, type(None), type(...), range, slice, Enum, np.dtype)


def _top(item: Any) -> str:
    """The package that a function or class is of."""
    return (getattr(item, "__module__", None) or "builtins").partition(".")[0]


def options_text(options: dict[str, Any]) -> list[str]:
    """Options of the compiler, the same in every process: sets have no order."""
    fixed = {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in options.items()}
    return sorted(f"{name}={value!r}" for name, value in fixed.items())


def _compiles(value: Any) -> bool:
    """Whether ``value`` is a compiled function or an intrinsic, both of which carry the function they were made of."""
    return hasattr(value, "py_func") or hasattr(value, "_defn") or isinstance(getattr(value, "__wrapped__", None), FunctionType)


def _named(module: str, name: str) -> Any:
    """What ``module.name`` stands for, or None; nothing of the script that is run, which is another one in another process."""
    found: Any = None if module == "__main__" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a code object does, without where it stands."""
    constants = [_code(part) if isinstance(part, CodeType) else _constant(part) for part in code.co_consts]
    shape = (code.co_argcount, code.co_kwonlyargcount, code.co_flags, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, constants, code.co_names, shape


def _constant(value: Any) -> Any:
    return ("set", sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _names(code: CodeType) -> list[str]:
    """All names that a code object and those within it use."""
    found = dict.fromkeys(code.co_names)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            found |= dict.fromkeys(_names(part))
    return list(found)
