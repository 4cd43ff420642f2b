"""The one door to the compiler: functions become machine code here, and nowhere else, and the code is kept.

Numba's own cache is not used. It asks whether the file of a function has changed, by the file's time, and not whether one has
that the function inlines; it writes beside the sources or where ``NUMBA_CACHE_DIR`` says, and cannot be imported where neither
can be written; it keeps the types of arguments in one index a function, which a type that is gone makes unreadable. Code of
other sources would be run, and could write past the ends of arrays. Here a file of code is found by a digest of all that it
was made of (``swapless.compiled_key``) and lies in the cache folder of this project (``swapless.compiled_store``).
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.extending import overload

from swapless import compiled_store as store
from swapless.compiled_key import Parts, Unknown, digest, options_text, part_of

Function = TypeVar("Function", bound=Callable[..., Any])

_waiting = store.Waiting()


def kernel(**options: Any) -> Callable[[Function], Function]:
    """Decorator of a function that is compiled for the types it is called with, without the interpreter's lock.

    Parameters
    ----------
    **options
        As :func:`numba.njit` has them.
    """

    # Numba would make an entry for callers in C of each, a tenth of the time that compiling takes: see CFunction.
    asked: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True} | options

    def wrap(function: Function) -> Function:
        compiled: Any = njit(**asked)(function)
        if compiled is not function:  # with NUMBA_DISABLE_JIT it stays Python
            compiled._cache = Kept(function, compiled.targetoptions)
        return compiled

    return wrap


class CFunction:
    """A function ``void (*)(void *)`` for callers in C, compiled when its address is first asked for.

    Parameters
    ----------
    function : callable
        Of one argument, a C pointer.
    **options
        As :func:`numba.cfunc` has them.
    """

    def __init__(self, function: Callable[..., None], **options: Any) -> None:
        self.py_func = function
        self.targetoptions = options

    @cached_property
    def address(self) -> int:
        """Where the machine code begins."""
        made: Any = CFunc(self.py_func, ((types.voidptr,), types.void), {}, {"nopython": True, **self.targetoptions})
        made._cache = Kept(self.py_func, self.targetoptions)
        made.compile()
        return int(made.address)


def rule(generic: Callable[..., Any], state_type: type, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Let compiled code run ``function`` where it calls ``generic`` with a ``state_type`` first."""
    part_of(state_type, function)

    def chosen(state: Any, *_: Any) -> Callable[..., Any] | None:
        return function if getattr(state, "instance_class", None) is state_type else None

    register: Any = overload
    register(generic, jit_options=options, strict=False)(chosen)


class Kept:
    """What numba asks for code of one function before it compiles, and gives it to afterwards: its interface of a cache.

    Parameters
    ----------
    function : callable
        The function, as Python has it.
    options : dict
        With which it is compiled.
    """

    cache_path = None

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._function = function
        self._options = options
        self._names: dict[Any, tuple[str, str]] = {}

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled function for a signature, or None: then it is compiled."""
        target_context.refresh()
        named = self._named(signature, target_context.codegen())
        if named is not None:
            found = self._rebuilt(store.read(*named), signature, target_context)
            if found is not None:
                return found
            self._names[signature] = named
        _waiting.begin((self, signature))
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep what was compiled for a signature."""
        _waiting.end((self, signature))
        named = self._names.pop(signature, None)
        if named is None or compiled.library.has_dynamic_globals or any(not part.can_cache for part in compiled.lifted):
            return
        store.write(*named, dumps(compiled._reduce()))

    def _named(self, signature: Any, codegen: Any) -> tuple[str, str] | None:
        """The state of the sources and the name of the file, by which the code for a signature is found."""
        state = digest()
        if state is None:
            return None
        given, result = _normal(signature)
        try:
            parts = Parts(self._function, (*given, result) if result is not None else given)
        except Unknown:
            return None
        shape = (self._function.__module__, self._function.__qualname__, options_text(self._options))
        key = repr((shape, parts.hexdigest(), len(given), codegen.magic_tuple()))
        folder = f"{store.PLUGINS}/" if parts.from_outside else ""
        return state, f"{folder}{self._function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.code"

    def _rebuilt(self, content: bytes | None, signature: Any, target_context: Any) -> Any:
        if content is None:
            return None
        try:
            found = CompileResult._rebuild(target_context, *pickle.loads(content))
        except Exception:  # whole, but not to be read by this process: compiled and kept anew
            return None
        return found if tuple(found.signature.args) == _normal(signature)[0] else None

    def flush(self) -> None:
        """Forget nothing: what is on disk is what these very sources compile to."""


def _normal(signature: Any) -> tuple[tuple[Any, ...], Any]:
    """Types of the arguments of a signature, and of its result if it says."""
    if hasattr(signature, "args"):
        return tuple(signature.args), signature.return_type
    return tuple(signature), None
