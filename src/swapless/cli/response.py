"""How a family writes its answers: which part is thinking and which the answer, as they are generated.

transformers describes such a format as a *response template* and parses a stream by it; a tokenizer may bring its own. Of the
formats that most families share and few tokenizers describe, harmony and thinking between tags, the templates stand here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["ResponseFormat", "ResponseReader", "response_format"]

_CHANNEL_END = ["<|end|>", "<|call|>", "<|return|>"]
_HARMONY: dict[str, Any] = {
    "start_anchor": "<|start|>assistant",
    "fields": {
        "thinking": {
            "open_pattern": r"<\|channel\|>(?:analysis|commentary)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
            "close": _CHANNEL_END,
            "repeats": True,
            "join": "\n",
        },
        "content": {
            "open_pattern": r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
            "close": _CHANNEL_END,
            "repeats": True,
            "join": "\n",
        },
    },
}
_HARMONY_MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")

_OPENINGS = ("<think>", "[THINK]", "<thinking>", "\u25c1think\u25b7", "<seed:think>")
_ENDINGS = ("</think>", "[/THINK]", "</thinking>", "\u25c1/think\u25b7", "</seed:think>")
_THINKING: dict[str, Any] = {
    "start_anchor_pattern": r"\A",
    "fields": {
        "reasoning_content": {
            "open_pattern": rf"\s*(?:{'|'.join(map(re.escape, _OPENINGS))})\s*",
            "close_pattern": rf"\s*(?:{'|'.join(map(re.escape, _ENDINGS))})\s*",
            "repeats": True,
            "join": "\n",
        },
        "content": {},
    },
}
_OPEN_AT_THE_END = re.compile(rf"(?:{'|'.join(map(re.escape, _OPENINGS))})\s*\Z")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A response template, and what of a prompt and of special tokens it looks at.

    Parameters
    ----------
    template : dict
        As transformers has them.
    marks : tuple of str, optional
        Texts of the special tokens that it looks at; by default all.
    anchor : re.Pattern
        Where the beginning of the answer stands in a prompt; what comes from there on was written by the chat template.
    until : ResponseFormat, optional
        How text is read until the first of the marks, where the format is not in force at once.
    at_once : bool
        Whether it is in force before the first mark: a model may do without them.
    """

    template: dict[str, Any]
    anchor: re.Pattern[str]
    marks: tuple[str, ...] | None = None
    until: ResponseFormat | None = None
    at_once: bool = True

    def begun(self, prompt: str) -> tuple[str, bool]:
        """What the prompt has of the answer already, such as an opening tag, and whether the format is in force with it."""
        found = None
        for found in self.anchor.finditer(prompt):  # noqa: B007 (the last one counts)
            pass
        if found is None:
            return "", self.at_once
        return prompt[found.start() :], self.at_once or any(mark in prompt[found.end() :] for mark in self.marks or ())


def response_format(tokenizer: Any, model: Any = None, *, chat: bool = True) -> ResponseFormat | None:
    """The format of this tokenizer's model; None where answers are plain text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its own response template comes first.
    model : PreTrainedModel, optional
        For the templates that transformers keeps by family.
    chat : bool
        Whether the prompt came from a chat template. A text that is only continued may hold tags that are part of it; there
        only formats of special tokens count, which are no part of any text.
    """
    if getattr(tokenizer, "get_response_parser", None) is None:
        return None  # an older transformers
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, dict):
        return ResponseFormat(own, _anchor_of(own))
    vocabulary = tokenizer.get_vocab()
    tagged = ResponseFormat(_THINKING, _OPEN_AT_THE_END, (*_OPENINGS, *_ENDINGS)) if chat else None
    if all(mark in vocabulary for mark in ("<|channel|>", "<|message|>", "<|start|>")):
        return ResponseFormat(_HARMONY, _anchor_of(_HARMONY), _HARMONY_MARKS, until=tagged, at_once=False)
    if not chat:
        return None
    known = None if model is None else _of_family(tokenizer, model)
    if known is not None:
        return ResponseFormat(known, _anchor_of(known))
    return tagged


def _of_family(tokenizer: Any, model: Any) -> dict[str, Any] | None:
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:  # not in every transformers
        return None
    found: dict[str, Any] | None = get_response_template(tokenizer, model)
    return found


def _anchor_of(template: dict[str, Any]) -> re.Pattern[str]:
    literal = template.get("start_anchor")
    if literal is None:
        return re.compile(str(template.get("start_anchor_pattern", r"\Z")), re.DOTALL)
    return re.compile("|".join(map(re.escape, [literal] if isinstance(literal, str) else literal)))


class ResponseReader:
    """Sorts generated text into thinking and answer as it comes.

    Parameters
    ----------
    form : ResponseFormat
        How the family writes.
    tokenizer : PreTrainedTokenizerBase
        Builds transformers' parser.
    prompt : str
        The prompt with its special tokens.
    answer, think : callable of str
        Receive the pieces.

    Raises
    ------
    ValueError
        In all methods: the tokenizer's own template cannot be read, or the text does not fit it.
    """

    def __init__(
        self, form: ResponseFormat, tokenizer: Any, prompt: str, answer: Callable[[str], None], think: Callable[[str], None]
    ) -> None:
        self._form, self._answer, self._think = form, answer, think
        begun, self._in_force = form.begun(prompt)
        self._until = ResponseReader(form.until, tokenizer, prompt, answer, think) if form.until else None
        self._parser = tokenizer.get_response_parser(form.template, prefix=begun)
        self._route(self._parser.initial_events)

    def feed(self, text: str, *, special: bool) -> None:
        """Take more of what was generated; a special token that the format does not look at is no part of the text."""
        wanted = not special or self._form.marks is None or text in self._form.marks
        if not self._in_force and special and wanted:
            self._in_force = True
            if self._until is not None:
                self._until.end()
        if self._in_force:
            if wanted:
                self._route(self._parser.feed(text))
        elif self._until is not None:
            self._until.feed(text, special=special)
        elif not special:
            self._answer(text)

    def end(self) -> None:
        """The text is over: what was held back is passed on."""
        if not self._in_force and self._until is not None:
            self._until.end()
        _, events = self._parser.finalize()
        self._route(events)

    def _route(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "region_chunk":
                (self._think if event["field"] in _REASONING else self._answer)(event["text"])
