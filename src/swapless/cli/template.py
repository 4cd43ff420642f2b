"""From a conversation to the tokens of a prompt, by the checkpoint's own chat template."""

from __future__ import annotations

from typing import Any, NoReturn

from swapless.errors import UsageError, message
from swapless.untrusted import shown

__all__ = ["Message", "chat_ids"]

Message = dict[str, Any]
_PROBE = "Swapless-asks-37"
"""A text that no template holds: by it one sees whether a template passes on what is said."""


def chat_ids(tokenizer: Any, messages: list[Message]) -> Any:
    """Token ids of a conversation up to where the answer begins, shape (1, T).

    Raises
    ------
    UsageError
        The checkpoint has no chat template, one that cannot be read, or one that refuses this conversation; the message says
        what it says.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("This checkpoint has no chat template. Leave --chat out and give --prompt.")
    parts = _takes_parts(tokenizer)
    ids = _applied(tokenizer, [_in_parts(one) for one in messages] if parts else messages)
    if not ids.shape[-1]:
        raise UsageError(
            "The chat template makes no prompt of this conversation. Say something, or give --prompt without --chat."
        )
    return ids


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template takes a message's content in parts, as those of models that see do, instead of as a text."""
    said = [{"role": "user", "content": _PROBE}]
    try:
        if _PROBE in _rendered(tokenizer, said):
            return False
    except Exception:  # Jinja, and what a template does with values of another kind; it is told when the real text fails
        pass
    try:
        return _PROBE in _rendered(tokenizer, [_in_parts(one) for one in said])
    except Exception:  # neither way: the text is tried, and its error told
        return False


def _in_parts(one: Message) -> Message:
    return one | {"content": [{"type": "text", "text": one["content"]}]}


def _rendered(tokenizer: Any, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _applied(tokenizer: Any, messages: list[Message]) -> Any:
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    except Exception as error:  # a template is a program of the checkpoint's: Jinja's errors, and whatever its filters raise
        _refuse(tokenizer, error)
    return encoded["input_ids"].long()


def _refuse(tokenizer: Any, error: Exception) -> NoReturn:
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(map(shown, tokenizer.chat_template))
        what = "This checkpoint has several chat templates, and none of them is the default."
        raise UsageError(message(what, got=names, step="Leave --chat out and give --prompt.")) from error
    kind = type(error).__name__
    said = " ".join(str(error).split()) or kind
    if kind == "TemplateError":  # raise_exception of the template itself
        raise UsageError(message("The chat template refuses this conversation.", got=said.rstrip("."))) from error
    step = "Leave --chat out and give --prompt."
    raise UsageError(
        message("The chat template of this checkpoint does not work.", got=f"{kind}: {said.rstrip('.')}", step=step)
    ) from error
