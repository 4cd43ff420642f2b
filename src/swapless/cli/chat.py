"""The conversation of ``swapless run --chat``: turns kept, commands that begin with a slash, Ctrl-C for the answer alone."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swapless.atomic import check_output, write_json, write_text
from swapless.cli.ask import Asker
from swapless.cli.out import Out
from swapless.cli.session import Reply, Sampling, generate, measured, summarise
from swapless.cli.template import Message, chat_ids
from swapless.errors import ContextError, SwaplessError, UnknownNameError, UsageError, did_you_mean, message

__all__ = ["chat_ids", "talk"]

HELP = {
    "/help": ("", "say this"),
    "/system": ("TEXT", "put TEXT before the conversation; without TEXT, nothing"),
    "/clear": ("", "forget the conversation"),
    "/save": ("FILE", "write the conversation to FILE: .json, or text of any other name"),
    "/exit": ("", "leave; so does Ctrl-D"),
}
_COMMAND = re.compile(r"(/\w+)(?:\s+(.*))?", re.DOTALL)


def talk(model: Any, tokenizer: Any, sampling: Sampling, out: Out, *, inputs: tuple[object, ...] = ()) -> None:
    """Answer message after message from stdin until it ends or says ``/exit``.

    The whole conversation is given anew to the model at each turn. One that has outgrown the context, or that the chat
    template refuses, is said so and stands as it was before the last message.

    Parameters
    ----------
    model, tokenizer, sampling, out
        As :func:`~swapless.cli.session.generate`.
    inputs : tuple of paths
        What ``/save`` must never replace.

    Raises
    ------
    UsageError
        The checkpoint has no chat template, or one that refuses a plain message.
    """
    Conversation(model, tokenizer, sampling, out, inputs).run()


class Conversation:
    """Turns so far, and what a message or a command does with them; parameters as :func:`talk`."""

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, out: Out, inputs: tuple[object, ...] = ()) -> None:
        self._model, self._tokenizer, self._sampling, self._out, self._inputs = model, tokenizer, sampling, out, inputs
        self._system: str | None = None
        self._turns: list[Message] = []
        self._figures: dict[str, Any] | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._set_system,
            "/clear": lambda _: self._turns.clear(),
            "/save": self._save,
        }

    def run(self) -> None:
        """Until the end of stdin or ``/exit``."""
        chat_ids(self._tokenizer, [{"role": "user", "content": "Hello"}])
        self._out.note("Type a message; /help lists the commands, Ctrl-C stops an answer, Ctrl-D or /exit leaves.")
        asker = Asker(self._out, HELP)
        try:
            while (text := asker.ask()) is not None and text != "/exit":
                try:
                    self._take(text, asker.interactive)
                except ContextError as error:
                    self._out.note(f"{error} /clear begins anew.")
                except (UsageError, UnknownNameError) as error:
                    self._out.note(f"Error: {error}")
        finally:
            asker.close()
        if self._figures:
            self._out.note("\nThe last answer:")
            summarise(self._figures, self._out)

    def _take(self, text: str, interactive: bool) -> None:
        command = _COMMAND.fullmatch(text)
        if command is None:
            if text:
                self._answer(text, interactive)
        elif command[1] in self._commands:
            self._commands[command[1]]((command[2] or "").strip())
        else:
            raise UsageError(
                message(f"Unknown command {command[1]}.", allowed=", ".join(HELP), step=did_you_mean(command[1], HELP) or None)
            )

    def _messages(self, *more: Message) -> list[Message]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns, *more]

    def _answer(self, text: str, interactive: bool) -> None:
        asked: Message = {"role": "user", "content": text}
        ids = chat_ids(self._tokenizer, self._messages(asked))
        self._model.swapless.reset_stats()
        try:
            with _stopped_by_ctrl_c() if interactive else _never() as stopped:
                how: Any = {"chat": True, "think": self._out.thinking, "warn": self._out.warn, "stopped": stopped}
                reply = generate(self._model, self._tokenizer, ids, self._sampling, self._out.generated, **how)
        except KeyboardInterrupt:
            if not interactive:
                raise
            self._out.text("")
            self._out.note("(stopped; the conversation stands as it was before your message)")
            return
        self._out.text("")
        self._figures = measured(reply, self._model.swapless)
        self._remark(reply)
        if reply.text.strip():
            self._turns += [asked, reply.message]

    def _remark(self, reply: Reply) -> None:
        """Say what the text itself does not show."""
        out = self._out
        if not reply.text.strip():
            what = "thinking" if reply.thinking else "empty"
            out.note(f"(no answer within {reply.new_tokens} tokens, all of it {what}; the conversation stands as it was)")
        elif reply.finish == "interrupted":
            out.note("(stopped)")
        elif reply.finish in ("length", "context"):
            end = (
                f"after {reply.new_tokens} tokens; --max-new-tokens"
                if reply.finish == "length"
                else "with the context; --context"
            )
            out.note(f"(cut {end} allows more)")

    def _help(self, _: str) -> None:
        for name, (argument, what) in HELP.items():
            self._out.note(f"{f'{name} {argument}':<14}{what}")
        self._out.note('A line that ends in \\ goes on in the next; between """ and """ stand several.')

    def _set_system(self, text: str) -> None:
        before, self._system = self._system, text or None
        try:
            chat_ids(self._tokenizer, self._messages({"role": "user", "content": "Hello"}))
        except UsageError:
            self._system = before
            raise
        self._out.note("(the conversation begins with it from now on)" if text else "(nothing stands before the conversation)")

    def _save(self, text: str) -> None:
        name, _, force = text.rpartition(" ") if text.endswith(" --force") else (text, "", "")
        if not name.strip():
            raise UsageError("Name a file: /save FILE.")
        try:
            path = check_output(Path(name.strip()).expanduser(), force=bool(force), inputs=self._inputs)
            messages = self._messages()
            if path.suffix == ".json":
                write_json(path, messages)
            else:
                write_text(path, "\n\n".join(f"{one['role']}:\n{one['content']}" for one in messages) + "\n")
        except (SwaplessError, RuntimeError) as error:  # RuntimeError: a user without a home
            raise UsageError(str(error)) from error
        self._out.note(f"Wrote {path}.")


@contextmanager
def _never() -> Iterator[Callable[[], bool]]:
    yield lambda: False


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; the second time it interrupts at once, as when a prompt takes long to be read."""
    pressed = 0

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed > 0
    finally:
        signal.signal(signal.SIGINT, before)
