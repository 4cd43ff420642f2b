"""Forward calls as steps: which phase, which rows, which texts they continue; seen around the whole model's ``forward``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from swapless.errors import ContextError, UnsupportedOperationError, message
from swapless.notation import Phase
from swapless.runtime.calls import ids_of, new_tokens, packed_texts, paged, row_after_row, valid_places
from swapless.runtime.door import grow_in_place, whole_attention
from swapless.runtime.engine import Engine
from swapless.runtime.generation import Generation, Generations, Prepared
from swapless.runtime.held import Held, cache_length, held_of, hold
from swapless.runtime.needs import call_of
from swapless.runtime.paged import PagedHeld
from swapless.runtime.plain import Graphless
from swapless.runtime.routing import Step
from swapless.runtime.rows import single_rows
from swapless.runtime.texts import NO_ROW, UNKNOWN_ROW, Texts


class Call(NamedTuple):
    """A forward call under way: its step, whether it is one row, and what is to be done once it is complete.

    ``done`` is called with what the model returned. ``weights`` says that the attention weights are wanted.
    """

    step: Step
    single_row: bool
    done: Callable[[Any], None]
    weights: bool = False


class StepHooks:
    """Tells the engine where a forward call begins and ends, and which texts its rows belong to.

    Parameters
    ----------
    engine : Engine
        What is told.
    context_tokens : int
        Most tokens a sequence may have, prompt and generated ones.
    rounded : bool
        Whether the model's weights are, so that a step of a single row need not keep the last bit of torch's products.

    Attributes
    ----------
    rounded : bool
        As above; may be changed between steps.
    """

    def __init__(self, engine: Engine, context_tokens: int, *, rounded: bool) -> None:
        self._engine = engine
        self._context_tokens = context_tokens
        self.rounded = rounded
        self._texts: Texts = engine.texts
        self._generations = Generations(self._texts, engine.turn)
        self._outside = Generation(self._texts)
        self._paged = PagedHeld(self._texts)

    def attach(self, model: torch.nn.Module) -> None:
        """See the calls of ``model`` as long as it lives."""
        self._signature = inspect.signature(type(model).forward)
        forward = self._forward_of(type(model), Graphless(model))
        model.forward = MethodType(forward, model)  # a method, so that a copy of the model has its own
        self._generations.attach(model)

    def _forward_of(self, cls: type[torch.nn.Module], graphless: Graphless) -> Callable[..., Any]:
        def run(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            call = self._begin(model, args, kwargs)
            if call is None:
                return cls.forward(model, *args, **kwargs)
            try:
                with single_rows() if call.single_row else whole_attention() if call.weights else nullcontext():
                    output = cls.forward(model, *args, **kwargs)
            except BaseException:  # Ctrl-C too: the routing of a part of the model is no row
                self._engine.abandon_step()
                raise
            self._engine.end_step()
            call.done(output)
            grow_in_place(_cache_in(output))
            return output

        @functools.wraps(cls.forward)
        def forward(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            with graphless((*args, *kwargs.values())):
                return self._engine.whole_call(run, (model, *args), kwargs)

        return forward

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if callable(get_eval_frame_callback()):  # torch.compile leaves out what it cannot trace, and never says that it did
            raise UnsupportedOperationError(
                message("An offloaded model cannot be compiled: its experts are read while it runs.", step="Leave compile out.")
            )
        given = self._signature.bind_partial(model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if new_tokens(given) is None:
            return None
        paged_call = self._paged_call(given)
        call = paged_call or self._packed_call(model, given) or self._plain_call(given)
        config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        sizes = call_of(given, config, *self._sizes(given, call.step, paged=paged_call is not None))
        self._engine.make_room(sizes, call.step.phase)
        self._engine.begin_step(call.step)
        asked = given.get("output_attentions", getattr(config, "output_attentions", False))
        return call._replace(weights=True) if asked else call

    @staticmethod
    def _sizes(given: dict[str, Any], step: Step, *, paged: bool) -> tuple[int, int, int]:
        """Sequences, new tokens of each, and tokens of each in the cache, which grows in place from now on."""
        rows = len(step.position)
        if paged:
            return 1, rows, max(0, int(step.position.max()) + 1 - rows)
        tokens = new_tokens(given)
        assert tokens is not None
        cache = next((value for value in given.values() if hasattr(value, "get_seq_length")), None)
        if cache is None:
            return tokens.shape[0], tokens.shape[1], 0
        grow_in_place(cache)
        past = cache_length(cache)
        return (
            tokens.shape[0],
            tokens.shape[1],
            max(0, int(step.position.max()) + 1 - tokens.shape[1]) if past is None else past,
        )

    def _check_context(self, tokens: int) -> None:
        if tokens > self._context_tokens:
            raise ContextError(
                message(
                    "More tokens than the context that the memory budget was made for.",
                    got=f"{tokens} tokens",
                    allowed=f"{self._context_tokens} tokens",
                    step="Load with a larger context, or shorten the prompt or --max-new-tokens.",
                )
            )

    # -- the kinds of call -------------------------------------------------------------------------------------------

    def _plain_call(self, given: dict[str, Any]) -> Call:
        """Sequences side by side, each a row of the batch, with a cache of transformers or without one."""
        texts, generation = self._texts, self._generations.now or self._outside
        no_text = generation.inner or self._engine.calls.nested
        prepared, generation.prepared = generation.prepared, None
        tokens, ids = new_tokens(given), ids_of(given)
        assert tokens is not None
        batch, length = tokens.shape[:2]
        cache = next((value for value in given.values() if hasattr(value, "get_seq_length")), None)
        mask = given.get("attention_mask")
        past = 0 if cache is None else self._past(cache, mask, length)
        self._check_context(past + length)
        if prepared is not None:
            mask = prepared.mask
        places = None if mask is None else valid_places(mask, batch, past, length)
        if mask is not None and (places is None or (prepared is None and not row_after_row(mask, batch, past, length))):
            texts.notes["an attention mask of its own was given, and each sequence of the batch is taken for one text"] += 1
        held = None if cache is None else held_of(cache, texts)
        if held is not None and held.batch == batch and past:
            if past < held.length:
                held.crop(past)
        elif cache is None and ids is not None:
            held = self._computed_again(generation, ids)
        else:
            held = None
        held = held or Held(texts, batch)
        again = held.length if cache is None else 0
        if past > held.length:
            held.pad_unknown(past, places)
        if cache is not None and not (generation.assistant and generation.calls):
            held.settle()  # of drafts, those that are left

        phase = _phase(past, length, prepared)
        drafts = 0
        if generation.assistant and generation.calls:
            drafts = length
        elif phase is Phase.DECODE and length > 1:
            drafts = length - 1
        start = held.num_tokens() if cache is not None else np.zeros(batch, np.int64)
        if length == 1 and places is None and not again and not no_text:
            everything, last = np.ones(batch, bool), held.last()
            rows = (texts.next_row + np.arange(batch))[:, None]
            step = Step(phase, held.stream, start.astype(np.int32), everything, None if ids is None else ids[:, 0], None, last)
        else:
            valid = np.ones((batch, length), bool) if places is None else places[:, past:]
            kept = valid & (np.arange(length) >= again) & (not no_text)
            of_row = np.repeat(np.arange(batch), length)
            step, rows = _step(texts, phase, of_row, valid.reshape(-1), kept.reshape(-1), ids, start, held.last(), held.stream)
            step = step._replace(continues=past > 0 and phase is Phase.PREFILL)
            rows = rows.reshape(batch, length)[:, again:]

        def done(output: Any) -> None:
            held.append(rows, drafts)
            given_back = cache if cache is not None else _cache_in(output)
            if given_back is not None:
                hold(given_back, held)
            if self._engine.calls.nested:
                return
            if cache is None and ids is not None:
                generation.plain = ids, held, texts.recording
            if generation is not self._outside:
                generation.ran(held, rows, prompt=prepared is not None and prepared.prompt)

        return Call(step, self.rounded and phase is Phase.DECODE and batch == length == 1, done)

    def _past(self, cache: Any, mask: Any, length: int) -> int:
        past = cache_length(cache)
        if past is not None:
            return past
        if not cache.has_previous_state():
            return 0
        held = held_of(cache, self._texts)
        if held is not None:
            return held.length
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            return int(mask.shape[1]) - length
        self._texts.notes["positions count from the first row here: a cache filled elsewhere has no length"] += 1
        return 1

    def _computed_again(self, generation: Generation, ids: np.ndarray) -> Held | None:
        """What is known of texts that are run anew from their beginning, for want of a cache: those of the call before."""
        if generation.plain is None:
            return None
        before, held, recording = generation.plain
        length = before.shape[1]
        if recording != self._texts.recording:
            return None
        if ids.shape[1] <= length or held.length != length:
            return None
        sources = []
        for sequence, begun in enumerate(ids[:, :length]):
            same = np.flatnonzero((before == begun).all(axis=1))
            if len(same) == 0:
                return None
            sources.append(sequence if sequence in same else int(same[0]))
        if generation is self._outside:
            self._texts.notes["a call without a cache that begins with the tokens of the last is taken to go on with it"] += 1
        held.select(np.array(sources))
        return held

    def _packed_call(self, model: Any, given: dict[str, Any]) -> Call | None:
        """Several texts one after another in each row of the batch, kept apart by positions that begin anew."""
        tokens, ids = new_tokens(given), ids_of(given)
        assert tokens is not None
        batch, length = tokens.shape[:2]
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(model.config.get_text_config(), "use_cache", True)
        cached = bool(use_cache) or any(hasattr(value, "get_seq_length") for value in given.values())
        parts = packed_texts(given, batch, length, cached=cached)
        if parts is None:
            return None
        self._check_context(length)
        _, of_row = np.unique(parts + np.arange(batch)[:, None] * (length + 1), return_inverse=True)
        of_row = of_row.reshape(-1)
        everything = np.ones(batch * length, bool)
        kept = everything & (not self._engine.calls.nested)
        none = np.zeros(of_row[-1] + 1, np.int64)
        streams = self._texts.streams(len(none))
        step, rows = _step(self._texts, Phase.PREFILL, of_row, everything, kept, ids, none, none + NO_ROW, streams)

        def done(output: Any) -> None:
            for last in rows[np.flatnonzero((np.diff(of_row, append=-1) != 0) & kept)].tolist():
                self._texts.end(last)

        return Call(step, False, done)

    def _paged_call(self, given: dict[str, Any]) -> Call | None:
        """Tokens of many requests, batched continuously over one cache of pages."""
        places = paged(given)
        if places is None:
            return None
        num_rows = len(places.write)
        of_row = np.searchsorted(places.first, np.arange(num_rows), side="right") - 1
        lengths = np.bincount(of_row)
        self._check_context(int((places.position + lengths).max()))
        before = self._paged.rows_before(places)
        phase = Phase.DECODE if (lengths == 1).all() and (places.position > 0).all() else Phase.PREFILL
        everything = np.ones(num_rows, bool)
        ids = ids_of(given)
        ids = None if ids is None else ids[:, :num_rows]
        streams = self._paged.streams(before)
        step, rows = _step(self._texts, phase, of_row, everything, everything, ids, places.position, before, streams)

        def done(output: Any) -> None:
            self._paged.append(places, rows, before, of_row, streams)

        return Call(step, self.rounded and phase is Phase.DECODE and num_rows == 1, done)


def _phase(past: int, length: int, prepared: Prepared | None) -> Phase:
    """Decode is a token a sequence on top of what went before, or several that are drafts; all else is prefill."""
    if past == 0:
        return Phase.PREFILL
    drafts = prepared is not None and not prepared.prompt
    return Phase.DECODE if length == 1 or drafts else Phase.PREFILL


def _step(
    texts: Texts,
    phase: Phase,
    of_row: np.ndarray,
    valid: np.ndarray,
    kept: np.ndarray,
    ids: np.ndarray | None,
    start: np.ndarray,
    before: np.ndarray,
    stream: np.ndarray,
) -> tuple[Step, np.ndarray]:
    """The step, and the number that each row int64 (T,) will have in the recording.

    ``of_row`` (T,) is the sequence of each row; ``start``, ``before`` and ``stream`` (N,) the position of each sequence's first
    row, the row before it, and its name.
    """
    place = np.cumsum(valid) - valid
    first = np.flatnonzero(np.diff(of_row, prepend=-1))
    position = (start - place[first])[of_row] + place
    rows = np.where(kept, texts.next_row + np.cumsum(kept) - 1, np.where(valid, UNKNOWN_ROW, NO_ROW))
    sequence = of_row[kept]
    parent = np.where(np.diff(sequence, prepend=-1) != 0, before[sequence], rows[kept] - 1)
    token_id = None if ids is None else ids.reshape(-1)
    step = Step(phase, stream[of_row], position.astype(np.int32), valid, token_id, kept, parent)
    return step, rows


def _cache_in(output: Any) -> Any:
    """The cache that a model hands back, None if it hands back none."""
    parts = output if isinstance(output, tuple) else output.values() if hasattr(output, "values") else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
