"""The conversation of ``swapless run --chat``: turns kept, /clear forgets them, /exit or the end of input leaves."""

from __future__ import annotations

import sys
from typing import Any

from swapless.cli.out import Out
from swapless.cli.session import Sampling, generate, measured, summarise
from swapless.errors import ContextError, UsageError

__all__ = ["chat_ids", "talk"]

Message = dict[str, str]


def chat_ids(tokenizer: Any, messages: list[Message]) -> Any:
    """Token ids of a conversation up to where the answer begins, shape (1, T).

    Raises
    ------
    UsageError
        The checkpoint has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("This checkpoint has no chat template. Leave --chat out and give --prompt.")
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return encoded["input_ids"]


def talk(model: Any, tokenizer: Any, sampling: Sampling, out: Out) -> None:
    """Answer line after line from stdin until it ends or says ``/exit``.

    The whole conversation is given anew to the model at each turn. One that has outgrown the context is said so and stands
    as it was before the last line.
    """
    chat_ids(tokenizer, [{"role": "user", "content": ""}])
    out.note("Type a message; /clear forgets the conversation, /exit or Ctrl-D leaves.")
    messages: list[Message] = []
    figures = None
    while (line := _ask(out)) is not None and line != "/exit":
        if line == "/clear":
            messages.clear()
        elif line:
            model.swapless.reset_stats()
            asked = [*messages, {"role": "user", "content": line}]
            try:
                reply = generate(model, tokenizer, chat_ids(tokenizer, asked), sampling, lambda piece: out.text(piece, end=""))
            except ContextError as error:
                out.note(f"{error} /clear begins anew.")
                continue
            out.text("")
            messages = [*asked, {"role": "assistant", "content": reply.text}]
            figures = measured(reply, model.swapless)
    if figures:
        out.note("\nThe last answer:")
        summarise(figures, out)


def _ask(out: Out) -> str | None:
    """The next line of stdin without its end, ``None`` when there are no more."""
    if sys.stdin.isatty() and not out.quiet:
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None
