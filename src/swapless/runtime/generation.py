"""``generate`` seen from outside: what it is about to run, and what its end says of the texts it leaves behind."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch

from swapless.runtime.held import Held
from swapless.runtime.texts import NO_ROW, Texts
from swapless.runtime.turns import Turn


class Prepared(NamedTuple):
    """What ``generate`` said of the next forward call: the attention mask as it was given, and whether it is the prompt's."""

    mask: torch.Tensor | None
    prompt: bool


class Generation:
    """One call of ``generate`` under way.

    Attributes
    ----------
    assistant : bool
        It drafts for another model.
    inner : bool
        It drafts for this very model, with a part of its layers: nothing of it is text.
    prepared : Prepared or None
        Of the next forward call.
    calls : int
        Forward calls so far.
    plain : (ndarray, Held, int) or None
        Token ids of the last call without a cache, what it held, and the number of the recording.
    """

    def __init__(self, texts: Texts, *, assistant: bool = False, inner: bool = False, ends: Ends | None = None) -> None:
        self.assistant, self.inner = assistant, inner
        self.prepared: Prepared | None = None
        self.calls = 0
        self.plain: tuple[np.ndarray, Held, int] | None = None
        self._texts = texts
        self._ends = ends or Ends(frozenset(), None)
        self._run: dict[int, _Run] = {}

    def ran(self, held: Held, rows: np.ndarray, *, prompt: bool) -> None:
        """A forward call was run on ``held``: its rows int64 (B, S), and whether they are still of the prompt."""
        held.in_generation, held.of_assistant = True, held.of_assistant or self.assistant
        self.calls += 1
        run = self._run.setdefault(id(held), _Run(held))
        if prompt or not run.rows:
            run.prompt_length = held.length
        known = rows[rows >= 0]
        if len(known):
            first, stop = int(known.min()), int(known.max()) + 1
            if run.rows and run.rows[-1][1] == first:
                run.rows[-1] = run.rows[-1][0], stop
            else:
                run.rows.append((first, stop))

    def finish(self, output: Any) -> None:
        """It ended by itself and returned ``output``."""
        if self.assistant:
            return
        for run in self._run.values():
            run.held.settle()
            if run.held.reordered:
                self._keep_returned(run, output)
            elif run.held.batch > 1:
                self._cut_after_end(run)

    def close(self) -> None:
        """It is over, however it ended."""
        for run in self._run.values():
            if run.held.reordered:
                alive = [path.rows for path in self._texts.paths()]
                self._texts.taken_back(np.setdiff1d(self._rows(run), np.concatenate(alive) if alive else []))
            run.held.at_rest()

    def _rows(self, run: _Run) -> np.ndarray:
        rows = np.concatenate([np.arange(first, stop) for first, stop in run.rows])
        return rows[rows >= self._texts.base]

    def _keep_returned(self, run: _Run, output: Any) -> None:
        """Of all beams only those that are returned are texts; one that had ended may run no more."""
        sequences = getattr(output, "sequences", output)
        if not isinstance(sequences, torch.Tensor) or sequences.dim() != 2:
            return
        texts = []
        for number, sequence in enumerate(sequences.numpy()):
            prompt = run.held.rows[number * run.held.batch // len(sequences), : run.prompt_length]
            padding = int((prompt == NO_ROW).sum())
            known = prompt[prompt >= self._texts.base]
            if len(known) and (self._texts.tokens(known) == -1).all():  # embeddings, which are not given back
                texts.append(np.concatenate([np.full(len(prompt) - padding, -1), sequence]))
            else:
                texts.append(sequence[padding:])
        run.held.let_go()
        for row in self._texts.matches(self._rows(run).tolist(), texts):
            self._texts.finish(row)

    def _cut_after_end(self, run: _Run) -> None:
        for sequence, rows in enumerate(run.held.rows):
            generated = rows[run.prompt_length :]
            if (generated < self._texts.base).any():
                continue
            length = self._ends.of(self._texts.tokens(generated))
            if length < len(generated):
                run.held.cut(sequence, run.prompt_length + length)


class Ends(NamedTuple):
    """What ends a text: the tokens ``eos``; and, where something else may end one too, the padding that then follows it."""

    eos: frozenset[int]
    padding: int | None

    def of(self, tokens: np.ndarray) -> int:
        """How many of the generated ``tokens`` int (n,) of a sequence are text."""
        ended = np.isin(tokens, list(self.eos))
        if ended.any():
            return int(np.argmax(ended)) + 1
        others = np.flatnonzero(tokens != self.padding)
        return int(others[-1]) + 1 if len(others) else 0

    @staticmethod
    def given(given: Mapping[str, Any], model: Any) -> Ends:
        """As ``generate`` is given them, or as the model has them by itself."""
        settings = [given, *(vars(config) for config in (given.get("generation_config"), model.generation_config) if config)]

        def setting(name: str) -> list[Any]:
            value: Any = next((found[name] for found in settings if found.get(name) is not None), [])
            value = value.tolist() if isinstance(value, torch.Tensor) else value
            return list(value) if isinstance(value, (list, tuple)) else [value]

        eos = setting("eos_token_id")
        padding = setting("pad_token_id") or eos
        otherwise = given.get("stopping_criteria") or setting("stop_strings")
        return Ends(frozenset(eos), padding[0] if otherwise and padding else None)


class _Run:
    """What a generation did with one cache: the ranges of its rows, and how long the prompt was."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.rows: list[tuple[int, int]] = []
        self.prompt_length = 0


class Generations:
    """The calls of ``generate`` on one model, of every thread for itself; those within another are drafts for it.

    Parameters
    ----------
    texts : Texts
        What they write.
    turn : Turn
        Of the model: other threads write too.
    """

    def __init__(self, texts: Texts, turn: Turn) -> None:
        self._texts, self._turn = texts, turn
        self._of_thread = threading.local()

    @property
    def now(self) -> Generation | None:
        """The innermost one under way in this thread."""
        stack = self._stack
        return stack[-1] if stack else None

    @property
    def _stack(self) -> list[Generation]:
        stack: list[Generation] = self._of_thread.__dict__.setdefault("stack", [])
        return stack

    def attach(self, model: Any) -> None:
        """See what ``model`` generates from now on; as with ``forward``, methods of the model, so that a copy has its own."""
        for wrap in (self._generate_of, self._prepare_of):
            method = wrap(type(model))
            if method is not None:
                setattr(model, method.__name__, MethodType(method, model))

    def _generate_of(self, cls: type) -> Any:
        plain = getattr(cls, "generate", None)
        if plain is None:
            return None
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(model, *args, **kwargs).arguments
            with self._one(model, given | given.get("kwargs", {})) as generation:
                output = plain(model, *args, **kwargs)
                with self._turn.lock:
                    generation.finish(output)
            _tell_assistant(given.get("assistant_model"), output)
            return output

        return generate

    def _prepare_of(self, cls: type) -> Any:
        plain = getattr(cls, "prepare_inputs_for_generation", None)
        if plain is None:
            return None

        @functools.wraps(plain)
        def prepare_inputs_for_generation(model: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = plain(model, *args, **kwargs)
            if self.now is not None:
                self.now.prepared = Prepared(kwargs.get("attention_mask"), bool(kwargs.get("is_first_iteration", False)))
            return inputs

        return prepare_inputs_for_generation

    @contextmanager
    def _one(self, model: Any, given: dict[str, Any]) -> Iterator[Generation]:
        assistant = bool(getattr(given.get("generation_config"), "is_assistant", False))
        inner = assistant and self.now is not None
        generation = Generation(self._texts, assistant=assistant, inner=inner, ends=Ends.given(given, model))
        self._stack.append(generation)
        try:
            yield generation
        finally:
            self._stack.remove(generation)
            with self._turn.lock:
                generation.close()


def _tell_assistant(assistant: Any, output: Any) -> None:
    """An offloaded assistant is never told what became of its last drafts, unless it is done here."""
    engine = getattr(assistant, "swapless", None)
    held, sequences = getattr(getattr(engine, "texts", None), "drafting", None), getattr(output, "sequences", output)
    if held is not None and isinstance(sequences, torch.Tensor) and len(sequences) == 1:
        held.accepted(sequences[0, :-1].numpy())
