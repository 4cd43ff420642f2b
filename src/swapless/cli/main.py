"""The command ``swapless``: its verbs, and how an error becomes one message and an exit code.

Exit codes: 0 done; 1 an error of the project, said in one message; 2 wrong usage; 130 stopped by Ctrl-C. A traceback appears
only with ``SWAPLESS_DEBUG=1`` in the environment, or where the error is a bug of ours.
"""

from __future__ import annotations

import errno
import functools
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from swapless import __version__
from swapless.cli.out import complain, open_standard_streams, stdout_error
from swapless.errors import SwaplessError, UsageError, message

__all__ = ["app", "main"]

VERBS = {
    "run": "swapless.cli.run:run",
    "plan": "swapless.cli.plan:plan",
    "doctor": "swapless.cli.doctor:doctor",
    "info": "swapless.cli.info:info",
    "verify": "swapless.cli.verify:verify",
    "pack": "swapless.cli.pack:pack",
    "perplexity": "swapless.cli.perplexity:perplexity",
    "record": "swapless.cli.record:record",
    "locality": "swapless.cli.locality:locality",
    "simulate": "swapless.cli.simulate:simulate",
    "predict": "swapless.cli.predict:VERBS",
    "oracle": "swapless.cli.oracle:VERBS",
    "demo": "swapless.cli.demo:demo",
}

_NAMES_OF_FILES = ("checkpoint", "path", "prefetch", "tokenizer")
"""Options and arguments that are text but may name a file."""

app = typer.Typer(
    name="swapless",
    help="Run Mixture-of-Experts language models in less memory than their weights.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"swapless {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Mixture-of-Experts language models in less memory than their weights."""


def _guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with errors of the project turned into one message on stderr and an exit code."""

    @functools.wraps(verb)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            _check_text(options)
            return verb(*arguments, **options)
        except SwaplessError as error:
            if os.environ.get("SWAPLESS_DEBUG"):
                raise
            complain(f"Error: {error}")
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        except OSError as error:
            if error.errno == errno.EPIPE or os.environ.get("SWAPLESS_DEBUG"):
                raise  # click ends a process whose reader went away
            complain(f"Error: {_of_the_system(error)}")
            raise typer.Exit(1) from None

    return call


def _waiting_asleep(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with OpenMP's threads asleep while they wait for each other, unless the environment says otherwise.

    By itself OpenMP spins for milliseconds, which beside another busy process makes fits and scores five times slower. Decoding
    is not told so: alone it would lose a tenth, and it sees to its threads itself.
    """

    @functools.wraps(verb)
    def call(*arguments: Any, **options: Any) -> Any:
        if "torch" not in sys.modules:  # which reads them when it is imported
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            os.environ.setdefault("KMP_BLOCKTIME", "0")
        return verb(*arguments, **options)

    return call


def _of_the_system(error: OSError) -> str:
    """What the operating system refused: a file that cannot be read, a disk that is full."""
    reason = error.strerror or str(error) or type(error).__name__
    return message(f"{reason[:1].upper()}{reason[1:].rstrip('.')}.", where=error.filename)


def _check_text(options: dict[str, Any]) -> None:
    """Refuse text with bytes that are not UTF-8: no tokenizer and no header could take it. Names of files may have them."""
    for name, value in options.items():
        if name in _NAMES_OF_FILES:
            continue
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    what = f"--{name.replace('_', '-')} is not UTF-8 text."
                    raise UsageError(message(what, got=f"a wrong byte at character {error.start}")) from None


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    complain(f"Warning: {message}")


def _register() -> None:
    for name, target in VERBS.items():
        module, _, function = target.partition(":")
        found = getattr(import_module(module), function)
        if callable(found):
            app.command(name)(_guarded(found))
            continue
        group = typer.Typer(help=import_module(module).__doc__, no_args_is_help=True, rich_markup_mode=None)
        for verb, call in found.items():
            group.command(verb)(_guarded(_waiting_asleep(call)))
        app.add_typer(group, name=name)


_register()


def main() -> None:
    """Run the command line with the arguments of this process."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 shows what it can
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        app()
    except OSError as error:  # outside of a verb: help into a full disk
        if os.environ.get("SWAPLESS_DEBUG"):
            raise
        complain(f"Error: {stdout_error(error)}")
        sys.exit(1)
    finally:
        gc.freeze()  # or the interpreter, on its way out, looks through all of torch and transformers for garbage: 0.8 s
