"""What a person types: lines with editing and history where there is a terminal, several of them between triple quotes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from swapless.cli.out import Out

__all__ = ["Asker"]

_QUOTES = '"""'
_MOST_LINES = 1000


class Asker:
    """Asks for one message after the other.

    On a terminal lines are edited with readline and remembered from conversation to conversation, in a file that only its
    owner may read. Elsewhere stdin is read as it is.

    Parameters
    ----------
    out : Out
        For prompts and remarks.
    commands : iterable of str
        What Tab completes.
    """

    def __init__(self, out: Out, commands: Iterable[str] = ()) -> None:
        self._out = out
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._readline: ModuleType | None = None
        if self.interactive and sys.stdout is not None and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # a Python without it: plain lines
                import readline

                self._readline = readline
                self._open_history(readline)
                self._complete(readline, sorted(commands))

    def ask(self) -> str | None:
        """The next message without space around it; None when there are no more.

        A line that ends in a backslash goes on in the next, and so does everything between triple quotes. Ctrl-C forgets what
        is being typed.
        """
        while True:
            try:
                return self._message()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._out.note("\n(Ctrl-D or /exit leaves.)")
            except UnicodeDecodeError:
                self._out.warn("A line that is not UTF-8 text was left out.")

    def close(self) -> None:
        """Keep the history."""
        if self._readline is None:
            return
        file = _history_file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
            self._readline.set_history_length(_MOST_LINES)
            self._readline.write_history_file(file)
        except OSError as error:
            self._out.note(f"The history could not be kept in {file}: {error.strerror}.")

    def _message(self) -> str:
        line = self._line("> ").strip()
        if line.startswith(_QUOTES):
            lines = [line[len(_QUOTES) :]]
            while not lines[-1].rstrip().endswith(_QUOTES):
                lines.append(self._line(". "))
            lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
            return "\n".join(lines).strip()
        while line.endswith("\\"):
            line = line[:-1].rstrip() + "\n" + self._line(". ").strip()
        return line

    def _line(self, prompt: str) -> str:
        prompt = "" if self._out.quiet else prompt
        if self._readline is not None:
            return input(prompt)
        if self.interactive:
            self._out.ask(prompt)
        raw = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return raw.decode("utf-8")

    def _open_history(self, readline: ModuleType) -> None:
        with contextlib.suppress(OSError):  # none yet, or none that may be read: what is typed now is remembered all the same
            readline.read_history_file(_history_file())

    def _complete(self, readline: ModuleType, commands: list[str]) -> None:
        def complete(text: str, number: int) -> str | None:
            found = [name for name in commands if text.startswith("/") and name.startswith(text)]
            return found[number] if number < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def _history_file() -> Path:
    from platformdirs import user_state_path

    return user_state_path("swapless", appauthor=False) / "chat_history"
